/* Gram matrices of long factors, and their products with r x r matrices: read once, accumulated in float64.
 *
 * A factor is a matrix of d rows and r columns, in float32 or bfloat16. "tall": its rows are contiguous (B of a LoRA
 * pair). "wide": its columns are (A, seen as A^T). GCC's and Clang's vector types; what is wider than the processor's
 * registers is split by the compiler. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, ROWS = 64, MIN_WORK = 1 << 17 };

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline doubles get(const double *from) { doubles v; memcpy(&v, from, sizeof v); return v; }
static inline void put(double *to, doubles v) { memcpy(to, &v, sizeof v); }

/* Reads up to LANES elements as float64; the rest are zero. */
static inline doubles load(const void *from, long at, long count, int half) {
  floats f;
  if (half) {
    halves h = {0};
    if (count >= LANES) memcpy(&h, (const uint16_t *)from + at, sizeof h);
    else memcpy(&h, (const uint16_t *)from + at, 2 * count);
    words w = __builtin_convertvector(h, words) << 16;
    memcpy(&f, &w, sizeof f);
  } else {
    f = (floats){0};
    if (count >= LANES) memcpy(&f, (const float *)from + at, sizeof f);
    else memcpy(&f, (const float *)from + at, 4 * count);
  }
  return __builtin_convertvector(f, doubles);
}

/* Writes up to LANES elements, rounded to nearest even. */
static inline void store(void *to, long at, long count, doubles v, int half) {
  floats f = __builtin_convertvector(v, floats);
  if (half) {
    words w, nan = (words)(f != f);
    memcpy(&w, &f, sizeof w);
    w = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    w = (w & ~nan) | (nan & 0x7fc0);
    halves h = __builtin_convertvector(w, halves);
    if (count >= LANES) memcpy((uint16_t *)to + at, &h, sizeof h);
    else memcpy((uint16_t *)to + at, &h, 2 * count);
  } else {
    if (count >= LANES) memcpy((float *)to + at, &f, sizeof f);
    else memcpy((float *)to + at, &f, 4 * count);
  }
}

/* Where LANES elements of row j begin: at columns c... of a tall factor, or in a wide one at column c of rows j... */
static inline long place(long j, long c, long d, long r, int wide) { return wide ? c * d + j : j * r + c; }

/* Converts rows [from, from + ROWS) to float64. tall: buffer[row][width]; wide: buffer[column][ROWS + LANES], where the
 * LANES keep the columns out of each other's cache sets. What is beyond the matrix becomes zero. */
enum { PITCH = ROWS + LANES };
static inline void convert(const void *x, long from, long d, long r, long width, int wide, int half, double *buffer) {
  long rows = d - from < ROWS ? d - from : ROWS;
  if (wide) {
    for (long c = 0; c < width; c++)
      for (long j = 0; j < ROWS; j += LANES) {
        long count = c < r && j < rows ? rows - j : 0;
        put(buffer + c * PITCH + j, count ? load(x, place(from + j, c, d, r, 1), count, half) : (doubles){0});
      }
  } else {
    for (long j = 0; j < rows; j++)
      for (long c = 0; c < width; c += LANES)
        put(buffer + j * width + c, load(x, place(from + j, c, d, r, 0), r - c, half));
  }
}

/* Adds the upper tiles of X^T X of converted rows to sums (width, width). */
static inline void add_tall(const double *buffer, long rows, long width, double *sums) {
  for (long a = 0; a < width; a += LANES)
    for (long b = a; b < width; b += 2 * LANES) {
      int two = b + LANES < width;
      long second = two ? LANES : 0; /* without a second tile the first is computed twice, and written once */
      doubles s[LANES][2];
      for (int i = 0; i < LANES; i++) {
        s[i][0] = get(sums + (a + i) * width + b);
        s[i][1] = get(sums + (a + i) * width + b + second);
      }
      for (long j = 0; j < rows; j++) {
        const double *row = buffer + j * width;
        doubles p = get(row + b), q = get(row + b + second);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i++) {
          s[i][0] += p * row[a + i];
          s[i][1] += q * row[a + i];
        }
      }
      for (int i = 0; i < LANES; i++) {
        put(sums + (a + i) * width + b, s[i][0]);
        if (two) put(sums + (a + i) * width + b + LANES, s[i][1]);
      }
    }
}

static inline double sum(doubles v) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

static inline void add_wide(const double *buffer, long width, double *sums) {
  for (long a = 0; a < width; a += 4)
    for (long b = a; b < width; b += 4) {
      doubles s[4][4];
      memset(s, 0, sizeof s);
      for (long j = 0; j < ROWS; j += LANES) {
        doubles p[4], q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          p[i] = get(buffer + (a + i) * PITCH + j);
          q[i] = get(buffer + (b + i) * PITCH + j);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++) s[i][k] += p[i] * q[k];
        }
      }
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) sums[(a + i) * width + b + k] += sum(s[i][k]);
    }
}

static inline void gram_of(const void *x, long from, long to, long d, long r, long width, int wide, int half,
                           double *sums, double *buffer) {
  for (long j = from; j < to; j += ROWS) {
    convert(x, j, d, r, width, wide, half, buffer);
    if (wide) add_wide(buffer, width, sums);
    else add_tall(buffer, d - j < ROWS ? d - j : ROWS, width, sums);
  }
}

static inline size_t element(int half) { return half ? 2 : 4; }
static inline long up(long n, long step) { return (n + step - 1) / step * step; }

/* X^T X of `blocks` factors, one after the other in memory, into out (blocks, r, r). Returns 0, or 1 without memory. */
int sdsopt_gram(const void *x, long blocks, long d, long r, int wide, int half, double *out, int threads) {
  long width = up(r, LANES), pieces = (d + ROWS - 1) / ROWS;
  if (d * r * blocks < MIN_WORK || pieces < threads) threads = 1;
  size_t each = width * width + width * PITCH;
  double *work = malloc(threads * each * sizeof(double));
  if (!work) return 1;
  for (long block = 0; block < blocks; block++) {
    const char *factor = (const char *)x + block * d * r * element(half);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      double *sums = work + t * each, *buffer = sums + width * width;
      long from = pieces * t / threads * ROWS, to = pieces * (t + 1) / threads * ROWS;
      memset(sums, 0, width * width * sizeof(double));
      /* The constants let the compiler make a version for each. */
      if (wide && half) gram_of(factor, from, to < d ? to : d, d, r, width, 1, 1, sums, buffer);
      else if (wide) gram_of(factor, from, to < d ? to : d, d, r, width, 1, 0, sums, buffer);
      else if (half) gram_of(factor, from, to < d ? to : d, d, r, width, 0, 1, sums, buffer);
      else gram_of(factor, from, to < d ? to : d, d, r, width, 0, 0, sums, buffer);
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
static inline void multiply_tall(const void *x, long from, long to, long r, long width, int half, const double *m,
                                 void *y, double *buffer) {
  enum { GROUP = 4 };
  for (long j = from; j < to; j += GROUP) {
    long rows = to - j < GROUP ? to - j : GROUP;
    for (long i = 0; i < rows; i++)
      for (long c = 0; c < width; c += LANES) put(buffer + i * width + c, load(x, (j + i) * r + c, r - c, half));
    for (long b = 0; b < width; b += 2 * LANES) {
      long second = b + LANES < width ? LANES : 0;
      doubles s[GROUP][2];
      memset(s, 0, sizeof s);
      for (long k = 0; k < r; k++) {
        doubles p = get(m + k * width + b), q = get(m + k * width + b + second);
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i++) {
          s[i][0] += p * buffer[i * width + k];
          s[i][1] += q * buffer[i * width + k];
        }
      }
      for (long i = 0; i < rows; i++) {
        store(y, (j + i) * r + b, r - b, s[i][0], half);
        if (second) store(y, (j + i) * r + b + LANES, r - b - LANES, s[i][1], half);
      }
    }
  }
}

static inline void multiply_wide(const void *x, long from, long to, long d, long r, long width, int half,
                                 const double *m, void *y, double *buffer) {
  for (long j = from; j < to; j += ROWS) {
    convert(x, j, d, r, width, 1, half, buffer);
    for (long a = 0; a < r; a += LANES)
      for (long i = 0; i < ROWS && j + i < to; i += 2 * LANES) {
        doubles s[LANES][2];
        memset(s, 0, sizeof s);
        for (long k = 0; k < r; k++) {
          const double *row = m + k * width + a;
          doubles p = get(buffer + k * PITCH + i), q = get(buffer + k * PITCH + i + LANES);
#pragma GCC unroll 8
          for (int l = 0; l < LANES; l++) {
            s[l][0] += p * row[l];
            s[l][1] += q * row[l];
          }
        }
        long first = to - j - i, second = first - LANES;
        for (int l = 0; l < LANES && a + l < r; l++) {
          store(y, (a + l) * d + j + i, first, s[l][0], half);
          if (second > 0) store(y, (a + l) * d + j + i + LANES, second, s[l][1], half);
        }
      }
  }
}

/* Y = X M for `blocks` factors of the same layout, with matrices (blocks, r, r), or their transposes. Returns 0, or 1
 * without memory. */
int sdsopt_multiply(const void *x, long blocks, long d, long r, int wide, int half, const double *matrices,
                    int transposed, void *y, int threads) {
  long width = up(r, LANES), pieces = (d + ROWS - 1) / ROWS;
  if (d * r * blocks < MIN_WORK || pieces < threads) threads = 1;
  double *work = malloc((width * width + threads * width * PITCH) * sizeof(double));
  if (!work) return 1;
  for (long block = 0; block < blocks; block++) {
    const char *from_ = (const char *)x + block * d * r * element(half);
    char *to_ = (char *)y + block * d * r * element(half);
    memset(work, 0, width * width * sizeof(double));
    for (long k = 0; k < r; k++)
      for (long c = 0; c < r; c++)
        work[k * width + c] = matrices[block * r * r + (transposed ? c * r + k : k * r + c)];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      double *buffer = work + width * width + t * width * PITCH;
      long from = pieces * t / threads * ROWS, to = pieces * (t + 1) / threads * ROWS;
      if (to > d) to = d;
      if (wide && half) multiply_wide(from_, from, to, d, r, width, 1, work, to_, buffer);
      else if (wide) multiply_wide(from_, from, to, d, r, width, 0, work, to_, buffer);
      else if (half) multiply_tall(from_, from, to, r, width, 1, work, to_, buffer);
      else multiply_tall(from_, from, to, r, width, 0, work, to_, buffer);
    }
  }
  free(work);
  return 0;
}
