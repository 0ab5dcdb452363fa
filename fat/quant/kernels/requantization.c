/* Requantization on CPUs in one pass over memory: from accumulators, sums, products and real values
 * to integers minus their zero point.
 *
 * Same arithmetic as fat/quant/kernels/requantization_reference.py, bit for bit: true division,
 * rounding half to even, no fused multiply-add (compile with -ffp-contract=off).
 */
#include <math.h>
#include <stdint.h>

/* The grid of a result, with the bounds of the fused activation as real values; `ceilings` are
 * bounds per channel, or NULL. */
typedef struct {
    const float *scale, *zero_point, *ceilings;
    float floor, ceiling;
    int qmin, qmax;
} grid_t;

static inline float clip(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* The integer of a real value, minus the zero point. */
static inline float on_grid(float x, const grid_t *g)
{
    float z = *g->zero_point;
    return clip(rintf(x / *g->scale) + z, (float)g->qmin, (float)g->qmax) - z;
}

static void upper_bounds(float *high, int64_t channels, const grid_t *g)
{
    float all = on_grid(g->ceiling, g);
    for (int64_t c = 0; c < channels; c++) {
        float own = g->ceilings ? on_grid(g->ceilings[c], g) : all;
        high[c] = own < all ? own : all;
    }
}

/* Runs BODY for every element i of channel c. Elements are in the order of memory: `inner` in a row
 * are of one channel. `one` is the place in a tensor with one element per image and channel, where
 * `image` elements are of one image. */
#define FOR_EACH(BODY)                                                                             \
    if (inner == 1) {                                                                              \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (n > 32768)")           \
        for (int64_t row = 0; row < n / channels; row++) {                                         \
            const int64_t first = row * channels / image * channels;                               \
            _Pragma("omp simd") for (int64_t c = 0; c < channels; c++)                             \
            {                                                                                      \
                const int64_t i = row * channels + c, one = first + c;                             \
                (void)one;                                                                         \
                BODY                                                                               \
            }                                                                                      \
        }                                                                                          \
    } else {                                                                                       \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (n > 32768)")           \
        for (int64_t row = 0; row < n / inner; row++) {                                            \
            const int64_t c = row % channels, one = row * inner / image * channels + c;            \
            (void)one;                                                                             \
            _Pragma("omp simd") for (int64_t i = row * inner; i < (row + 1) * inner; i++)          \
            {                                                                                      \
                BODY                                                                               \
            }                                                                                      \
        }                                                                                          \
    }

#define GRID                                                                                       \
    const float *scale, const float *zero_point, float floor, float ceiling,                       \
        const float *ceilings, int qmin, int qmax
#define SIZE int64_t n, int64_t channels, int64_t inner, int64_t image, int threads
#define SET_GRID                                                                                   \
    const grid_t grid = {scale, zero_point, ceilings, floor, ceiling, qmin, qmax};                 \
    const float low = on_grid(floor, &grid);                                                       \
    float *high = bounds;                                                                          \
    upper_bounds(high, channels, &grid)

/* y = clip(round((sums + bias) * input_scale * weight_scale / (scale * count))). `wide` sums are
 * double and need not be exact integers. `steps` is 1 if each channel has a weight_scale, else 0.
 * `bounds` has room for 2 * channels floats. */
void fat_requantize(const void *sums, int wide, const int32_t *bias, const float *input_scale,
                    const float *weight_scale, int steps, int64_t count, float *y, float *bounds,
                    SIZE, GRID)
{
    SET_GRID;
    float *multiplier = bounds + channels;
    for (int64_t c = 0; c < channels; c++) {
        float product = weight_scale ? *input_scale * weight_scale[steps * c] : *input_scale;
        multiplier[c] = product / (*scale * (float)count);
    }
    const float *narrow_sums = sums;
    const double *wide_sums = sums;
    if (wide && bias)
        FOR_EACH(float a = (float)(rint(wide_sums[i]) + (double)bias[c]);
                 y[i] = clip(rintf(a * multiplier[c]), low, high[c]);)
    else if (wide)
        FOR_EACH(float a = (float)rint(wide_sums[i]);
                 y[i] = clip(rintf(a * multiplier[c]), low, high[c]);)
    else if (bias)
        FOR_EACH(float a = (float)((double)narrow_sums[i] + (double)bias[c]);
                 y[i] = clip(rintf(a * multiplier[c]), low, high[c]);)
    else
        FOR_EACH(y[i] = clip(rintf(narrow_sums[i] * multiplier[c]), low, high[c]);)
}

/* y = clip(round(x / scale)). `bounds` has room for `channels` floats, also below. */
void fat_requantize_real(const float *x, float *y, float *bounds, SIZE, GRID)
{
    SET_GRID;
    const float d = *scale;
    FOR_EACH(y[i] = clip(rintf(x[i] / d), low, high[c]);)
}

/* y = clip(round(A * (a_scale / scale) + (B * (b_scale / scale) + c)) - z), A = a + a_zero. The two
 * multiply-adds are fused: double represents the products exactly. `per_image`: `b` has one element
 * per image and channel. */
void fat_requantize_sum(const float *a, const float *a_scale, const float *a_zero, int a_offset,
                        const float *b, const float *b_scale, const float *b_zero, int b_offset,
                        int offset, int per_image, float *y, float *bounds, SIZE, GRID)
{
    SET_GRID;
    const double by_a = *a_scale / *scale, by_b = *b_scale / *scale;
    const double za = *a_zero + (float)a_offset, zb = *b_zero + (float)b_offset;
    const float zero = *zero_point + (float)offset;
    const float zeros = (float)(by_a * za + (double)(float)(by_b * zb));
    const double rest = zero - zeros;
    if (per_image)
        FOR_EACH(float partial = (float)(((double)b[one] + zb) * by_b + rest);
                 float sum = (float)(((double)a[i] + za) * by_a + (double)partial);
                 y[i] = clip(rintf(sum) - zero, low, high[c]);)
    else
        FOR_EACH(float partial = (float)(((double)b[i] + zb) * by_b + rest);
                 float sum = (float)(((double)a[i] + za) * by_a + (double)partial);
                 y[i] = clip(rintf(sum) - zero, low, high[c]);)
}

/* y = clip(round(a * b * (a_scale * b_scale / scale) + z) - z). */
void fat_requantize_product(const float *a, const float *a_scale, const float *b,
                            const float *b_scale, int offset, int per_image, float *y,
                            float *bounds, SIZE, GRID)
{
    SET_GRID;
    const float multiplier = *a_scale * *b_scale / *scale;
    const float zero = *zero_point + (float)offset;
    if (per_image)
        FOR_EACH(float value = a[i] * b[one] * multiplier + zero;
                 y[i] = clip(rintf(value) - zero, low, high[c]);)
    else
        FOR_EACH(float value = a[i] * b[i] * multiplier + zero;
                 y[i] = clip(rintf(value) - zero, low, high[c]);)
}
