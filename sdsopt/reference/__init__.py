"""The paper's own parametrization, to check the corrections against: ΔW = s·(Q_B·A + B·Q_A).

```python
convert(model)  # a PeftModel, right after get_peft_model
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
schedule = SDSSchedule(model, optimizer, total_steps=1000)
for batch in batches:
    ...
    optimizer.step()
    schedule.step()
export_adapter(model, "out")  # a plain LoRA adapter of rank 2r
```

The corrections need none of this: they work on standard LoRA layers. Source: SDS-LoRA, arXiv 2606.16454; where the
paper's text leaves a choice open, this follows public re-implementations (no official code was found).
"""

from sdsopt.reference.convert import convert
from sdsopt.reference.export import export_adapter
from sdsopt.reference.schedule import SDSSchedule
from sdsopt.reference.sds_linear import SDSLinear

__all__ = ["SDSLinear", "SDSSchedule", "convert", "export_adapter"]
