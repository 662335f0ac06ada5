/* Causal attention with RoPE from queries, keys and values as a projection leaves them; kernels/cpu_attention.py
   compiles and calls it.

       y_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(D)) v_j        (Vaswani et al. 2017, eq. 1)

   projected (B, T, 3, H, D); cos, sin (T, D), the sine's first half negated, or NULL; y (B, T, H, D); log_sums
   (B, H, T): log sum_j exp(q_i . k_j / sqrt(D)). A thread takes one head of one sequence and QUERIES queries at a time:
   their scores are a block in its cache, of which only what lies before the last of them is computed. */

#include "products.h"

#define QUERIES 48 /* a multiple of TILE; cpu_attention.py knows it too */

typedef struct {
    const float *projected, *cos, *sin;
    int64_t T, H, D, Dp, Tp; /* p: padded to whole vectors */
} heads;

/* queries (part 0), keys (1) or values (2) of a head, turned by RoPE where it applies: (T, D) -> (T, Dp) */
static void unpack(const heads *s, int64_t b, int64_t h, int part, float *to) {
    int64_t half = s->D / 2, stride = 3 * s->H * s->D;
    const float *from = s->projected + b * s->T * stride + (part * s->H + h) * s->D;
    for (int64_t t = 0; t < s->T; t++, from += stride, to += s->Dp) {
        for (int64_t d = s->D; d < s->Dp; d++) to[d] = 0;
        if (!s->cos || part == 2) {
            memcpy(to, from, sizeof(float) * s->D);
            continue;
        }
        const float *cos = s->cos + t * s->D, *sin = s->sin + t * s->D;
        for (int64_t d = 0; d < half; d++) to[d] = from[d] * cos[d] + from[d + half] * sin[d];
        for (int64_t d = half; d < s->D; d++) to[d] = from[d] * cos[d] + from[d - half] * sin[d];
    }
}

/* the gradient of what unpack gave, turned back, into its place; a rotation's transpose is that by the opposite angle */
static void pack(const heads *s, int64_t b, int64_t h, int part, const float *from, float *of_projected) {
    int64_t half = s->D / 2, stride = 3 * s->H * s->D;
    float *to = of_projected + b * s->T * stride + (part * s->H + h) * s->D;
    for (int64_t t = 0; t < s->T; t++, from += s->Dp, to += stride) {
        if (!s->cos || part == 2) {
            memcpy(to, from, sizeof(float) * s->D);
            continue;
        }
        const float *cos = s->cos + t * s->D, *sin = s->sin + t * s->D;
        for (int64_t d = 0; d < half; d++) to[d] = from[d] * cos[d] + from[d + half] * sin[d + half];
        for (int64_t d = half; d < s->D; d++) to[d] = from[d] * cos[d] + from[d - half] * sin[d - half];
    }
}

/* a head's rows (T, D) of a tensor (B, T, H, D) -> (T, Dp) */
static void gather(const heads *s, int64_t b, int64_t h, const float *from, float *to) {
    for (int64_t t = 0; t < s->T; t++) {
        memcpy(to + t * s->Dp, from + ((b * s->T + t) * s->H + h) * s->D, sizeof(float) * s->D);
        for (int64_t d = s->D; d < s->Dp; d++) to[t * s->Dp + d] = 0;
    }
}

/* -inf after column `last` of a row of `width`, a multiple of LANES */
static inline void hide(float *row, int64_t last, int64_t width) {
    for (int64_t j = last + 1; j < width; j++) row[j] = -INFINITY;
}

static inline float largest(const float *row, int64_t width) {
    vec most = first(row, LANES);
    for (int64_t j = LANES; j < width; j += LANES) {
        vec next = first(row + j, LANES);
        ints is_more = next > most;
        most = (vec)(((ints)next & is_more) | ((ints)most & ~is_more));
    }
    float value = most[0];
    for (int i = 1; i < LANES; i++) value = most[i] > value ? most[i] : value;
    return value;
}

/* exp(row - shift) in its place; the sum */
static inline float weigh(float *row, int64_t width, float shift) {
    vec total = {0};
    for (int64_t j = 0; j < width; j += LANES) {
        vec w = exp_below_zero(first(row + j, LANES) - shift);
        put(row + j, w, LANES);
        total += w;
    }
    return sum(total);
}

void attention_forward(const float *projected, const float *cos, const float *sin, float *y, float *log_sums,
                       float *scratch, int64_t size, int64_t B, int64_t T, int64_t H, int64_t D, int64_t threads) {
    const heads all = {projected, cos, sin, T, H, D, padded(D), padded(T)}, *s = &all;
    const int64_t Dp = s->Dp, Tp = s->Tp;
    const float factor = 1.0f / sqrtf((float)D);
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t unit = 0; unit < B * H; unit++) {
        int64_t b = unit / H, h = unit % H;
        float *q = scratch + omp_get_thread_num() * size, *k = q + T * Dp, *v = k + T * Dp, *k_t = v + T * Dp;
        float *scores = k_t + D * Tp, *mixed = scores + QUERIES * Tp, totals[QUERIES];
        unpack(s, b, h, 0, q);
        unpack(s, b, h, 1, k);
        unpack(s, b, h, 2, v);
        memset(k_t, 0, sizeof(float) * D * Tp);
        transpose(k, T, D, Dp, k_t, Tp);
        for (int64_t start = 0; start < T; start += QUERIES) {
            int64_t n = T - start < QUERIES ? T - start : QUERIES, seen = padded(start + n);
            product(n, seen, D, q + start * Dp, Dp, 1, k_t, Tp, scores, Tp, factor, 0);
            for (int64_t i = 0; i < n; i++) {
                float *row = scores + i * Tp;
                hide(row, start + i, seen);
                float most = largest(row, seen);
                totals[i] = weigh(row, seen, most);
                log_sums[unit * T + start + i] = most + logf(totals[i]);
            }
            product(n, Dp, start + n, scores, Tp, 1, v, Dp, mixed, Dp, 1.0f, 0);
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < D; d++) y[((b * T + start + i) * H + h) * D + d] = mixed[i * Dp + d] / totals[i];
        }
    }
}

void attention_backward(const float *grad_y, const float *projected, const float *cos, const float *sin, const float *y,
                        const float *log_sums, float *of_projected, float *scratch, int64_t size, int64_t B, int64_t T,
                        int64_t H, int64_t D, int64_t threads) {
    const heads all = {projected, cos, sin, T, H, D, padded(D), padded(T)}, *s = &all;
    const int64_t Dp = s->Dp, Tp = s->Tp;
    const float factor = 1.0f / sqrtf((float)D);
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t unit = 0; unit < B * H; unit++) {
        int64_t b = unit / H, h = unit % H;
        float *q = scratch + omp_get_thread_num() * size, *k = q + T * Dp, *v = k + T * Dp, *k_t = v + T * Dp;
        float *scores = k_t + D * Tp, *grad = scores + QUERIES * Tp, *v_t = grad + T * Dp, *of_q = v_t + D * Tp;
        float *of_k = of_q + T * Dp, *of_v = of_k + T * Dp, *of_scores = of_v + T * Dp;
        unpack(s, b, h, 0, q);
        unpack(s, b, h, 1, k);
        unpack(s, b, h, 2, v);
        gather(s, b, h, grad_y, grad);
        memset(k_t, 0, sizeof(float) * D * Tp);
        memset(v_t, 0, sizeof(float) * D * Tp);
        transpose(k, T, D, Dp, k_t, Tp);
        transpose(v, T, D, Dp, v_t, Tp);
        memset(of_k, 0, sizeof(float) * T * Dp);
        memset(of_v, 0, sizeof(float) * T * Dp);
        for (int64_t start = 0; start < T; start += QUERIES) {
            int64_t n = T - start < QUERIES ? T - start : QUERIES, end = start + n, seen = padded(end);
            product(n, seen, D, q + start * Dp, Dp, 1, k_t, Tp, scores, Tp, factor, 0);
            product(n, seen, D, grad + start * Dp, Dp, 1, v_t, Tp, of_scores, Tp, 1.0f, 0);
            for (int64_t i = 0; i < n; i++) {
                const float *y_i = y + ((b * T + start + i) * H + h) * D, *grad_i = grad + (start + i) * Dp;
                float *row = scores + i * Tp, *of_row = of_scores + i * Tp, mean = 0;
                for (int64_t d = 0; d < D; d++) mean += y_i[d] * grad_i[d];
                hide(row, start + i, seen);
                weigh(row, seen, log_sums[unit * T + start + i]);
                for (int64_t j = 0; j < seen; j += LANES)
                    put(of_row + j, first(row + j, LANES) * (first(of_row + j, LANES) - mean) * factor, LANES);
            }
            product(end, Dp, n, scores, 1, Tp, grad + start * Dp, Dp, of_v, Dp, 1.0f, 1);
            product(end, Dp, n, of_scores, 1, Tp, q + start * Dp, Dp, of_k, Dp, 1.0f, 1);
            product(n, Dp, end, of_scores, Tp, 1, k, Dp, of_q + start * Dp, Dp, 1.0f, 0);
        }
        pack(s, b, h, 0, of_q, of_projected);
        pack(s, b, h, 1, of_k, of_projected);
        pack(s, b, h, 2, of_v, of_projected);
    }
}
