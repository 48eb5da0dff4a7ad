/* Gram matrices of long factors, and their products with r x r matrices: read once, accumulated in float64.
 *
 * A factor is a matrix of d rows and r columns, in float32 or bfloat16. "tall": its rows are contiguous (B of a LoRA
 * pair). "wide": its columns are (A, seen as A^T). GCC's and Clang's vector types, as wide as the processor's
 * registers: wider ones go through memory. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* LANES: the doubles in a register. GROUP x 2 and TILE x TILE_B vectors of sums stay in registers: 16 where there are
 * 32 of these, else 8. */
#if defined(__AVX512F__)
enum { LANES = 8, GROUP = 8, TILE = 4, TILE_B = 4 };
#elif defined(__AVX__)
enum { LANES = 4, GROUP = 4, TILE = 4, TILE_B = 2 };
#else
enum { LANES = 2, GROUP = 4, TILE = 4, TILE_B = 2 };
#endif

/* ROWS are converted at a time, and PITCH apart, which keeps columns out of each other's cache sets. Below MIN_WORK
 * elements a second thread costs more than it does. */
enum { ROWS = 128, PITCH = ROWS + 8, ALIGNMENT = 64, MIN_WORK = 1 << 14 };

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

static inline doubles get(const double *from) { doubles v; memcpy(&v, from, sizeof v); return v; }
static inline void put(double *to, doubles v) { memcpy(to, &v, sizeof v); }

/* Reads into a register: GCC would read from memory again for each use. */
static inline doubles load(const double *from) {
  doubles v = get(from);
#ifdef __x86_64__
  __asm__("" : "+v"(v));
#endif
  return v;
}

/* Converts n elements in a row. */
static inline void widen(const void *x, long at, long n, int half, double *to) {
  if (half) {
    const uint16_t *from = (const uint16_t *)x + at;
    for (long i = 0; i < n; i++) {
      uint32_t bits = (uint32_t)from[i] << 16;
      float f;
      memcpy(&f, &bits, sizeof f);
      to[i] = f;
    }
  } else {
    const float *from = (const float *)x + at;
    for (long i = 0; i < n; i++) to[i] = from[i];
  }
}

/* Writes up to LANES elements, rounded; none if `count` is not positive. */
static inline void store(float *to, long count, doubles v) {
  floats f = __builtin_convertvector(v, floats);
  if (count >= LANES) memcpy(to, &f, sizeof f);
  else if (count > 0) memcpy(to, &f, count * sizeof(float));
}

/* Converts rows [from, from + rows) to float64. tall: buffer[row][width]; wide: buffer[column][PITCH], filled up with
 * zeros to ROWS. Columns beyond the matrix are zero. */
static inline void convert(const void *x, long from, long rows, long d, long r, long width, int wide, int half,
                           double *buffer) {
  if (wide) {
    for (long c = 0; c < width; c++) {
      long count = c < r ? rows : 0;
      widen(x, c * d + from, count, half, buffer + c * PITCH);
      memset(buffer + c * PITCH + count, 0, (ROWS - count) * sizeof(double));
    }
  } else if (r == width) {
    widen(x, from * r, rows * r, half, buffer);
  } else {
    for (long j = 0; j < rows; j++) {
      widen(x, (from + j) * r, r, half, buffer + j * width);
      memset(buffer + j * width + r, 0, (width - r) * sizeof(double));
    }
  }
}

/* Adds one or two tiles of X^T X of converted rows, from (a, b) to the right, to sums (width, width). */
static inline void add_tiles(const double *buffer, long rows, long width, long a, long b, int tiles, double *sums) {
  doubles s[GROUP][2];
  for (int i = 0; i < GROUP; i++)
    for (int t = 0; t < tiles; t++) s[i][t] = get(sums + (a + i) * width + b + t * LANES);
  for (long j = 0; j < rows; j++) {
    const double *row = buffer + j * width;
    doubles p[2];
    for (int t = 0; t < tiles; t++) p[t] = load(row + b + t * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++)
      for (int t = 0; t < tiles; t++) s[i][t] += p[t] * row[a + i];
  }
  for (int i = 0; i < GROUP; i++)
    for (int t = 0; t < tiles; t++) put(sums + (a + i) * width + b + t * LANES, s[i][t]);
}

/* Adds the upper tiles. */
static inline void add_tall(const double *buffer, long rows, long width, double *sums) {
  for (long a = 0; a < width; a += GROUP) {
    long b = a;
    if ((width - a) / LANES % 2) {
      add_tiles(buffer, rows, width, a, b, 1, sums);
      b += LANES;
    }
    for (; b < width; b += 2 * LANES) add_tiles(buffer, rows, width, a, b, 2, sums);
  }
}

/* The same of wide ones. A vector holds LANES rows, so sums are vectors, one for each element, tile by tile. */
static inline void add_wide(const double *buffer, long width, double *sums) {
  for (long a = 0; a < width; a += TILE)
    for (long b = a; b < width; b += TILE_B, sums += TILE * TILE_B * LANES) {
      doubles s[TILE][TILE_B];
      for (int i = 0; i < TILE; i++)
        for (int k = 0; k < TILE_B; k++) s[i][k] = get(sums + (i * TILE_B + k) * LANES);
      for (long j = 0; j < ROWS; j += LANES) {
        doubles p[TILE], q[TILE_B];
        for (int i = 0; i < TILE; i++) p[i] = load(buffer + (a + i) * PITCH + j);
        for (int k = 0; k < TILE_B; k++) q[k] = load(buffer + (b + k) * PITCH + j);
        for (int i = 0; i < TILE; i++)
          for (int k = 0; k < TILE_B; k++) s[i][k] += p[i] * q[k];
      }
      for (int i = 0; i < TILE; i++)
        for (int k = 0; k < TILE_B; k++) put(sums + (i * TILE_B + k) * LANES, s[i][k]);
    }
}

/* Adds what add_wide added up to a matrix like that of add_tall. */
static void collect(const double *sums, long width, double *matrix) {
  for (long a = 0; a < width; a += TILE)
    for (long b = a; b < width; b += TILE_B)
      for (int i = 0; i < TILE; i++)
        for (int k = 0; k < TILE_B; k++, sums += LANES)
          for (int l = 0; l < LANES; l++) matrix[(a + i) * width + b + k] += sums[l];
}

static inline void gram_of(const void *x, long from, long to, long d, long r, long width, int wide, int half,
                           double *sums, double *buffer) {
  for (long j = from; j < to; j += ROWS) {
    long rows = to - j < ROWS ? to - j : ROWS;
    convert(x, j, rows, d, r, width, wide, half, buffer);
    if (wide) add_wide(buffer, width, sums);
    else add_tall(buffer, rows, width, sums);
  }
}

static inline size_t element(int half) { return half ? 2 : 4; }
static inline long up(long n, long step) { return (n + step - 1) / step * step; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* X^T X of `blocks` factors, one after the other in memory, into out (blocks, r, r). Returns 0, or 1 without memory. */
int sdsopt_gram(const void *x, long blocks, long d, long r, int wide, int half, double *out, int threads) {
  long width = up(r, GROUP), pieces = (d + ROWS - 1) / ROWS;
  threads = d * r * blocks < MIN_WORK ? 1 : least(threads, pieces);
  /* The upper tiles: in each row of them TILE / TILE_B fewer. */
  size_t vectors = wide ? (width + TILE) / 2 * width * LANES : 0;
  size_t each = width * width + vectors + width * PITCH;
  double *work = aligned_alloc(ALIGNMENT, threads * each * sizeof(double));
  if (!work) return 1;
  for (long block = 0; block < blocks; block++) {
    const char *factor = (const char *)x + block * d * r * element(half);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      double *matrix = work + t * each, *sums = wide ? matrix + width * width : matrix;
      double *buffer = matrix + width * width + vectors;
      long from = pieces * t / threads * ROWS, to = least(pieces * (t + 1) / threads * ROWS, d);
      memset(matrix, 0, (width * width + vectors) * sizeof(double));
      /* The constants let the compiler make a version for each. */
      if (wide && half) gram_of(factor, from, to, d, r, width, 1, 1, sums, buffer);
      else if (wide) gram_of(factor, from, to, d, r, width, 1, 0, sums, buffer);
      else if (half) gram_of(factor, from, to, d, r, width, 0, 1, sums, buffer);
      else gram_of(factor, from, to, d, r, width, 0, 0, sums, buffer);
      if (wide) collect(sums, width, matrix);
    }
    for (long a = 0; a < r; a++)
      for (long b = a; b < r; b++) {
        double total = 0;
        for (int t = 0; t < threads; t++) total += work[t * each + a * width + b];
        out[(block * r + a) * r + b] = out[(block * r + b) * r + a] = total;
      }
  }
  free(work);
  return 0;
}

/* Rows [from, to) of Y = X M, with M padded to (width, width). */
static inline void multiply_tall(const float *x, long from, long to, long r, long width, const double *m, float *y,
                                 double *buffer) {
  for (long j = from; j < to; j += GROUP) {
    long rows = least(to - j, GROUP);
    widen(x, j * r, rows * r, 0, buffer);
    for (long b = 0; b < width; b += 2 * LANES) {
      long second = b + LANES < width ? LANES : 0;
      doubles s[GROUP][2];
      memset(s, 0, sizeof s);
      for (long k = 0; k < r; k++) {
        doubles p = load(m + k * width + b), q = load(m + k * width + b + second);
#pragma GCC unroll 8
        for (int i = 0; i < GROUP; i++) {
          s[i][0] += p * buffer[i * r + k];
          s[i][1] += q * buffer[i * r + k];
        }
      }
      for (long i = 0; i < rows; i++) {
        store(y + (j + i) * r + b, r - b, s[i][0]);
        if (second) store(y + (j + i) * r + b + LANES, r - b - LANES, s[i][1]);
      }
    }
  }
}

static inline void multiply_wide(const float *x, long from, long to, long d, long r, long width, const double *m,
                                 float *y, double *buffer) {
  for (long j = from; j < to; j += ROWS) {
    long rows = least(to - j, ROWS);
    convert(x, j, rows, d, r, width, 1, 0, buffer);
    for (long a = 0; a < r; a += GROUP)
      for (long i = 0; i < rows; i += 2 * LANES) {
        doubles s[GROUP][2];
        memset(s, 0, sizeof s);
        for (long k = 0; k < r; k++) {
          const double *row = m + k * width + a;
          doubles p = load(buffer + k * PITCH + i), q = load(buffer + k * PITCH + i + LANES);
#pragma GCC unroll 8
          for (int l = 0; l < GROUP; l++) {
            s[l][0] += p * row[l];
            s[l][1] += q * row[l];
          }
        }
        for (int l = 0; l < GROUP && a + l < r; l++) {
          float *row = y + (a + l) * d + j + i;
          store(row, rows - i, s[l][0]);
          store(row + LANES, rows - i - LANES, s[l][1]);
        }
      }
  }
}

/* Y = X M in float32 for `blocks` factors of the same layout, with matrices (blocks, r, r), or their transposes.
 * Returns 0, or 1 without memory. */
int sdsopt_multiply(const float *x, long blocks, long d, long r, int wide, const double *matrices, int transposed,
                    float *y, int threads) {
  long width = up(r, GROUP), pieces = (d + ROWS - 1) / ROWS;
  threads = d * r * blocks < MIN_WORK ? 1 : least(threads, pieces);
  double *work = aligned_alloc(ALIGNMENT, (width * width + threads * width * PITCH) * sizeof(double));
  if (!work) return 1;
  for (long block = 0; block < blocks; block++) {
    const float *from_ = x + block * d * r;
    float *to_ = y + block * d * r;
    memset(work, 0, width * width * sizeof(double));
    for (long k = 0; k < r; k++)
      for (long c = 0; c < r; c++)
        work[k * width + c] = matrices[block * r * r + (transposed ? c * r + k : k * r + c)];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      double *buffer = work + width * width + t * width * PITCH;
      long from = pieces * t / threads * ROWS, to = least(pieces * (t + 1) / threads * ROWS, d);
      if (wide) multiply_wide(from_, from, to, d, r, width, work, to_, buffer);
      else multiply_tall(from_, from, to, r, width, work, to_, buffer);
    }
  }
  free(work);
  return 0;
}
