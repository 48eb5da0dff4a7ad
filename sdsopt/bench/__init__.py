"""What the correction costs, side by side with the bare optimizer and with other implementations.

```python
from sdsopt.bench import Settings, bench

report = bench(Settings(shapes=["llama-3-8b"], ranks=[16]))
print(report.markdown())
```
"""

from sdsopt.bench.api import Report, bench
from sdsopt.bench.settings import Settings

__all__ = ["Report", "Settings", "bench"]
