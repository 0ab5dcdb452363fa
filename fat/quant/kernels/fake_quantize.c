/* Fake quantization on CPUs in one pass over memory, where torch operations need four or more.
 *
 * Same arithmetic as fat/quant/kernels/reference.py, bit for bit: true division, rounding half to
 * even, no fused multiply-add (compile with -ffp-contract=off). Sums are computed per block of BLOCK
 * elements (a compiler flag) and added in order: results do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>

/* A rounding error of 1/2 step is coded as +-126; +-127 marks values outside the grid, -128 NaN. */
#define FINE 252.0f
#define OUTSIDE 127
#define UNKNOWN (-128)

static inline float clip(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* The bounds of the integers before adding the zero point. */
#define GRID(scale, zero, qmin, qmax)                                                              \
    float d = *(scale), low = (float)(qmin) - *(zero), high = (float)(qmax) - *(zero)

/* y = d * clip(round(x / d), qmin - zero, qmax - zero). y may be x. */
void fat_forward(const float *x, float *y, int64_t n, const float *step, const float *zero,
                 int qmin, int qmax, int threads)
{
    GRID(step, zero, qmin, qmax);
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 8)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
#pragma omp simd
        for (int64_t i = b * BLOCK; i < end; i++)
            y[i] = clip(rintf(x[i] / d), low, high) * d;
    }
}

/* fat_forward, and in one byte per element the rounding error, which the backward pass needs. */
void fat_forward_code(const float *x, float *y, int8_t *code, int64_t n, const float *step,
                      const float *zero, int qmin, int qmax, int threads)
{
    GRID(step, zero, qmin, qmax);
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 8)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
#pragma omp simd
        for (int64_t i = b * BLOCK; i < end; i++) {
            float v = x[i] / d, r = rintf(v);
            float error = (r - v) * FINE;
            error = r < low ? -(float)OUTSIDE : error;
            error = r > high ? (float)OUTSIDE : error;
            error = v != v ? (float)UNKNOWN : error;
            code[i] = (int8_t)(int32_t)rintf(error);
            y[i] = clip(r, low, high) * d;
        }
    }
}

/* Computes grad_x, by_scale = d out/d scale . grad and by_zero = -d * (sum of the gradients of
 * values outside the grid). sums has room for both parts of each block. */
void fat_backward_code(const int8_t *code, const float *grad, float *grad_x, double *sums,
                       int64_t n, const float *step, const float *zero, int qmin, int qmax,
                       float *by_scale, float *by_zero, int threads)
{
    GRID(step, zero, qmin, qmax);
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 8)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
        float scale = 0.0f, outside = 0.0f;
#pragma omp simd reduction(+ : scale, outside)
        for (int64_t i = b * BLOCK; i < end; i++) {
            float c = code[i]; /* compared as float: masks of integers are a third slower */
            float g = grad[i];
            float inside = fabsf(c) < OUTSIDE ? g : 0.0f;
            float slope = c / FINE;
            slope = c >= OUTSIDE ? high : slope;
            slope = c <= -OUTSIDE ? low : slope;
            grad_x[i] = inside;
            scale += g * slope;
            outside += g - inside;
        }
        int8_t least = 0;
#pragma omp simd reduction(min : least)
        for (int64_t i = b * BLOCK; i < end; i++)
            least = code[i] < least ? code[i] : least;
        sums[2 * b] = least == UNKNOWN ? NAN : scale;
        sums[2 * b + 1] = outside;
    }
    double total = 0.0, beyond = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        total += sums[2 * b];
        beyond += sums[2 * b + 1];
    }
    *by_scale = (float)total;
    *by_zero = (float)(-(double)d * beyond);
}

/* Weights: rows of k values on a grid -q..q. The step of row r is scale[r * stride]. Effect of `f`
 * by `adjust`: 0 none, 1 multiplies (w * clip(f)), 2 moves by steps (w + clip(f) * d). */
static inline float adjusted(float w, float f, float d, int adjust, float low, float high)
{
    if (adjust == 1)
        return w * clip(f, low, high);
    if (adjust == 2)
        return w + clip(f, low, high) * d;
    return w;
}

#define FORWARD_ROWS(ADJUST)                                                                       \
    for (int64_t r = 0; r < rows; r++) {                                                           \
        float d = scale[r * stride], unit = integers ? 1.0f : d;                                   \
        const float *wr = w + r * k, *fr = f + (ADJUST ? r * k : 0);                               \
        float *yr = y + r * k;                                                                     \
        _Pragma("omp simd") for (int64_t i = 0; i < k; i++)                                        \
            yr[i] = clip(rintf(adjusted(wr[i], fr[ADJUST ? i : 0], d, ADJUST, low, high) / d),     \
                         -q, q) * unit;                                                            \
    }

/* Returns real values, or with `integers` those in units of the step. */
void fat_forward_rows(const float *w, const float *f, float *y, int integers, const float *scale,
                      int64_t stride, int64_t rows, int64_t k, float q, int adjust, float low,
                      float high)
{
    if (adjust == 1)
        FORWARD_ROWS(1)
    else if (adjust == 2)
        FORWARD_ROWS(2)
    else
        FORWARD_ROWS(0)
}

#define BACKWARD_ROWS(ADJUST)                                                                      \
    for (int64_t r = 0; r < rows; r++) {                                                           \
        float d = scale[r * stride];                                                               \
        const float *wr = w + r * k, *gr = grad + r * k, *fr = f + (ADJUST ? r * k : 0);           \
        float *or = grad_f + (ADJUST ? r * k : 0);                                                 \
        double total = 0.0;                                                                        \
        for (int64_t start = 0; start < k; start += BLOCK) {                                       \
            int64_t end = start + BLOCK < k ? start + BLOCK : k;                                   \
            float sum = 0.0f;                                                                      \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = start; i < end; i++)           \
            {                                                                                      \
                float fi = fr[ADJUST ? i : 0];                                                     \
                float v = adjusted(wr[i], fi, d, ADJUST, low, high) / d, n = rintf(v);             \
                float inside = (n >= -q && n <= q) ? gr[i] : 0.0f;                                 \
                float slope = (n >= -q && n <= q) ? n - v : clip(n, -q, q);                        \
                sum += gr[i] * slope;                                                              \
                if (ADJUST) {                                                                      \
                    float unit = ADJUST == 1 ? wr[i] : d;                                          \
                    or[i] = (fi >= low && fi <= high) ? inside * unit : 0.0f;                      \
                }                                                                                  \
            }                                                                                      \
            total += sum;                                                                          \
        }                                                                                          \
        grad_scale[r] = (float)total;                                                              \
    }

void fat_backward_rows(const float *w, const float *f, const float *grad, float *grad_f,
                       float *grad_scale, const float *scale, int64_t stride, int64_t rows,
                       int64_t k, float q, int adjust, float low, float high)
{
    if (adjust == 1)
        BACKWARD_ROWS(1)
    else if (adjust == 2)
        BACKWARD_ROWS(2)
    else
        BACKWARD_ROWS(0)
}
