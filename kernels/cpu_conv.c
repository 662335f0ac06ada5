/* A short causal convolution of each channel, and silu after it; kernels/cpu_conv.py compiles and calls it.

       y_t = f(p_t), p_t = bias + sum_j taps_j x_(t-j), f(p) = p sigmoid(p) or p

   x (batch, T, C) with `stride` floats from token to token; taps (K, C), tap j reading j tokens back; bias (C) or NULL;
   reach (batch, T): how many tokens back, of K - 1, a token may read; y (batch, T, C). A thread takes SPAN tokens, row
   by row: the rows that a token reads are still in its cache. */

#include "vectors.h"

#define SPAN 64 /* cpu_conv.py knows it too */
#define PANEL 256 /* channels whose rows, taps and sums fit a first-level cache together */

typedef struct {
    const float *x, *taps, *bias;
    const int32_t *reach;
    int64_t T, C, stride, K, silu;
} conv;

static inline int reach_of(const conv *c, int64_t b, int64_t t) { return c->reach[b * c->T + t]; }

static inline const float *row_of(const conv *c, int64_t b, int64_t t) { return c->x + (b * c->T + t) * c->stride; }

/* p_t for n channels from d on */
static inline vec convolved(const conv *c, const float *x_t, int reach, int64_t d, int64_t n) {
    vec p = c->bias ? first(c->bias + d, n) : all(0);
    for (int j = 0; j <= reach; j++) p += first(c->taps + j * c->C + d, n) * first(x_t - j * c->stride + d, n);
    return p;
}

void conv_forward(const float *x, const float *taps, const float *bias, const int32_t *reach, float *y, int64_t batch,
                  int64_t T, int64_t C, int64_t stride, int64_t K, int64_t silu, int64_t threads) {
    const conv settings = {x, taps, bias, reach, T, C, stride, K, silu}, *c = &settings;
    int64_t spans = (T + SPAN - 1) / SPAN;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * spans; unit++) {
        int64_t b = unit / spans, start = unit % spans * SPAN;
        for (int64_t t = start; t < T && t < start + SPAN; t++)
            for (int64_t d = 0; d < C; d += LANES) {
                int64_t n = lanes(C - d);
                vec p = convolved(c, row_of(c, b, t), reach_of(c, b, t), d, n);
                put(y + (b * T + t) * C + d, silu ? p * sigmoid(p) : p, n);
            }
    }
}

/* dL/dp_t into the ring, and what it gives the taps, the bias and x_t, for channels from `first_d` to `last_d` */
static inline void backward_of(const conv *c, int64_t b, int64_t t, int64_t end, int64_t first_d, int64_t last_d,
                               const float *grad_y, float *grad_x, float *of_taps, float *of_bias, float *of_p) {
    const int64_t T = c->T, C = c->C, K = c->K;
    const float *x_t = row_of(c, b, t), *grad = grad_y + (b * T + t) * C;
    int is_ours = t < end, back = reach_of(c, b, t), readers = 0; /* tokens t + 1 ... that read t */
    while (readers + 1 < K && t + readers + 1 < T && reach_of(c, b, t + readers + 1) > readers) readers++;
    for (int64_t d = first_d; d < last_d; d += LANES) {
        int64_t n = lanes(last_d - d);
        vec g = first(grad + d, n);
        if (c->silu) {
            vec p = convolved(c, x_t, back, d, n);
            g *= silu_slope(p, sigmoid(p));
        }
        put(of_p + t % K * C + d, g, n);
        if (!is_ours) continue;
        vec of_x = first(c->taps + d, n) * g;
        for (int j = 1; j <= readers; j++) of_x += first(c->taps + j * C + d, n) * first(of_p + (t + j) % K * C + d, n);
        put(grad_x + (b * T + t) * C + d, of_x, n);
        put(of_bias + d, first(of_bias + d, n) + g, n);
        for (int j = 0; j <= back; j++) {
            float *tap = of_taps + j * C + d;
            put(tap, first(tap, n) + g * first(x_t - j * c->stride + d, n), n);
        }
    }
}

/* Backward through time. `ring` holds dL/dp of the last K tokens, (K, C) for each thread; grad_taps (units, K, C) and
   grad_bias (units, C), with a unit for each SPAN tokens of a sequence, are for the caller to add up. */
void conv_backward(const float *grad_y, const float *x, const float *taps, const float *bias, const int32_t *reach,
                   float *grad_x, float *grad_taps, float *grad_bias, float *ring, int64_t batch, int64_t T, int64_t C,
                   int64_t stride, int64_t K, int64_t silu, int64_t threads) {
    const conv settings = {x, taps, bias, reach, T, C, stride, K, silu}, *c = &settings;
    int64_t spans = (T + SPAN - 1) / SPAN;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * spans; unit++) {
        int64_t b = unit / spans, start = unit % spans * SPAN, end = start + SPAN < T ? start + SPAN : T;
        float *of_taps = grad_taps + unit * K * C, *of_bias = grad_bias + unit * C;
        float *of_p = ring + omp_get_thread_num() * K * C;
        memset(of_taps, 0, sizeof(float) * K * C);
        memset(of_bias, 0, sizeof(float) * C);
        for (int64_t d = 0; d < C; d += PANEL)
            for (int64_t t = (end + K - 1 < T ? end + K - 1 : T) - 1; t >= start; t--)
                backward_of(c, b, t, end, d, d + PANEL < C ? d + PANEL : C, grad_y, grad_x, of_taps, of_bias, of_p);
    }
}
