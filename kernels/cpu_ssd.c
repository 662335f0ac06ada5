/* Mamba-2's scan in chunks, forward and backward; kernels/cpu_ssd.py compiles and calls it.

       h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t        y_t = C_t h_t + D x_t        (Dao & Gu 2024, section 6)

   Within a chunk of Q tokens, with S_t the running sum of dt A in it, y_l = sum over s <= l of
   (C_l . B_s) exp(S_l - S_s) dt_s x_s, and beside it exp(S_l) C_l h from the state h before the chunk.

   x, y (batch, T, H, P); dt (batch, T, H); A, D (H), A negative; B, C (batch, T, G, N) for the R = H / G heads of a group; x, B
   and C with `stride` floats from token to token; begin (batch, T) or NULL: where the document of a token begins;
   before (chunks, batch, H, N, P), the states before chunks. A thread takes HEADS heads of a group through one sequence.
   Nothing is divided by a decay: each is exp of a sum of terms below zero. */

#include "products.h"

#define HEADS 4 /* that share C . B; cpu_ssd.py knows it too */

typedef struct {
    const float *x, *dt, *A, *B, *C, *D;
    const int32_t *begin;
    int64_t batch, T, H, P, G, N, Q, x_stride, B_stride, C_stride;
} scan;

/* what a thread works in; p: padded to whole vectors */
typedef struct {
    int64_t Pp, Np, Qp;
    float *states, *of_states;                        /* HEADS x (N, Pp) */
    float *B, *C, *B_t, *scores;                      /* (Q, Np) twice, (N, Qp), (Q, Qp) */
    float *of_B, *of_C, *of_scores;                   /* (Q, Np) twice, (Q, Qp) */
    float *x, *x_t, *weighed, *y, *grad, *of_x;       /* (Q, Pp), but x_t (P, Qp) */
    float *decay, *weights, *of_weights;              /* (Q, Qp): exp(S_l - S_s), times dt_s (C_l . B_s) */
    float *turned;                                    /* (P, Np) */
    float *sums, *dt, *from_start, *to_end, *of_sums, *of_dt, *own; /* (Qp) */
} space;

static int64_t lay_out(space *w, const scan *s, float *at) {
    w->Pp = padded(s->P), w->Np = padded(s->N), w->Qp = padded(s->Q);
    const int64_t state = HEADS * s->N * w->Pp, QN = s->Q * w->Np, QQ = s->Q * w->Qp, QP = s->Q * w->Pp;
    struct { float **to; int64_t floats; } parts[] = {
        {&w->states, state}, {&w->of_states, state}, {&w->B, QN}, {&w->C, QN}, {&w->B_t, s->N * w->Qp}, {&w->scores, QQ},
        {&w->of_B, QN}, {&w->of_C, QN}, {&w->of_scores, QQ}, {&w->x, QP}, {&w->x_t, s->P * w->Qp}, {&w->weighed, QP},
        {&w->y, QP}, {&w->grad, QP}, {&w->of_x, QP}, {&w->decay, QQ}, {&w->weights, QQ}, {&w->of_weights, QQ},
        {&w->turned, s->P * w->Np}, {&w->sums, w->Qp}, {&w->dt, w->Qp}, {&w->from_start, w->Qp}, {&w->to_end, w->Qp},
        {&w->of_sums, w->Qp}, {&w->of_dt, w->Qp}, {&w->own, w->Qp},
    };
    int64_t floats = 0;
    for (uint64_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (at) *parts[i].to = at + floats;
        floats += padded(parts[i].floats);
    }
    return floats;
}

/* floats of scratch that a thread needs */
void ssd_scratch(int64_t P, int64_t N, int64_t Q, int64_t *floats) {
    const scan s = {.P = P, .N = N, .Q = Q};
    space w;
    *floats = lay_out(&w, &s, NULL);
}

/* n rows of `width` floats, `stride` apart -> `padded_width` apart, zeros between */
static void rows_in(const float *from, int64_t n, int64_t width, int64_t stride, float *to, int64_t padded_width) {
    for (int64_t i = 0; i < n; i++, from += stride, to += padded_width) {
        memcpy(to, from, sizeof(float) * width);
        for (int64_t j = width; j < padded_width; j++) to[j] = 0;
    }
}

static void rows_out(const float *from, int64_t n, int64_t width, int64_t padded_width, float *to, int64_t stride) {
    for (int64_t i = 0; i < n; i++) memcpy(to + i * stride, from + i * padded_width, sizeof(float) * width);
}

/* to_i = [to_i +] factor_i from_i for n rows */
static inline void scale_rows(float *to, const float *from, const float *factor, int64_t n, int64_t width, int adds) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j += LANES) {
            vec v = first(from + i * width + j, LANES) * factor[i];
            put(to + i * width + j, adds ? first(to + i * width + j, LANES) + v : v, LANES);
        }
}

static inline float dot(const float *a, const float *b, int64_t width) {
    vec total = {0};
    for (int64_t j = 0; j < width; j += LANES) total += first(a + j, LANES) * first(b + j, LANES);
    return sum(total);
}

/* B, C and C . B of a chunk of n tokens */
static void load_chunk(const scan *s, space *w, int64_t b, int64_t g, int64_t start, int64_t n) {
    int64_t at = b * s->T + start;
    rows_in(s->B + at * s->B_stride + g * s->N, n, s->N, s->B_stride, w->B, w->Np);
    rows_in(s->C + at * s->C_stride + g * s->N, n, s->N, s->C_stride, w->C, w->Np);
    memset(w->B_t, 0, sizeof(float) * s->N * w->Qp);
    transpose(w->B, n, s->N, w->Np, w->B_t, w->Qp);
    product(n, padded(n), s->N, w->C, w->Np, 1, w->B_t, w->Qp, w->scores, w->Qp, 1.0f, 0);
}

/* x and the weights of a head in a chunk; gives what of the state goes through it */
static float load_head(const scan *s, space *w, int64_t b, int64_t h, int64_t start, int64_t n) {
    int64_t at = b * s->T + start, Qp = w->Qp;
    const int32_t *begin = s->begin ? s->begin + at : NULL;
    rows_in(s->x + at * s->x_stride + h * s->P, n, s->P, s->x_stride, w->x, w->Pp);
    float running = 0, last, A = s->A[h];
    for (int64_t t = 0; t < n; t++) {
        if (begin && begin[t] == start + t) running = 0; /* or a sum would round by another document */
        w->dt[t] = s->dt[(at + t) * s->H + h];
        running += w->dt[t] * A;
        w->sums[t] = running;
    }
    for (int64_t t = n; t < Qp; t++) w->sums[t] = w->dt[t] = 0;
    last = w->sums[n - 1];
    for (int64_t t = 0; t < Qp; t += LANES) {
        vec sums = first(w->sums + t, LANES);
        put(w->from_start + t, exp_below_zero(sums), LANES);
        put(w->to_end + t, exp_below_zero(last - sums), LANES);
    }
    for (int64_t t = 0; begin && t < n; t++) {
        if (begin[t] >= start) w->from_start[t] = 0;
        if (begin[n - 1] > start + t) w->to_end[t] = 0;
    }
    for (int64_t l = 0; l < n; l++) {
        int64_t from = begin && begin[l] > start ? begin[l] - start : 0;
        for (int64_t c = 0; c < padded(n); c += LANES) {
            vec decay = all(0);
            if (c <= l && c + LANES > from) {
                decay = exp_below_zero(w->sums[l] - first(w->sums + c, LANES));
                if (c + LANES > l || c < from)
                    for (int i = 0; i < LANES; i++)
                        if (c + i > l || c + i < from) decay[i] = 0;
            }
            put(w->decay + l * Qp + c, decay, LANES);
            put(w->weights + l * Qp + c, decay * first(w->dt + c, LANES) * first(w->scores + l * Qp + c, LANES), LANES);
        }
    }
    return w->from_start[n - 1];
}

void ssd_forward(const float *x, const float *dt, const float *A, const float *B, const float *C, const float *D,
                 const int32_t *begin, float *y, float *before, float *scratch, int64_t size, int64_t batch, int64_t T, int64_t H, int64_t P,
                 int64_t G, int64_t N, int64_t Q, int64_t x_stride, int64_t B_stride, int64_t C_stride,
                 int64_t threads) {
    const scan settings = {x, dt, A, B, C, D, begin, batch, T, H, P, G, N, Q, x_stride, B_stride, C_stride};
    const scan *s = &settings;
    const int64_t R = H / G, blocks = (R + HEADS - 1) / HEADS;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * G * blocks; unit++) {
        int64_t b = unit / (G * blocks), g = unit / blocks % G, r = unit % blocks * HEADS;
        int64_t heads = R - r < HEADS ? R - r : HEADS;
        space work, *w = &work;
        lay_out(w, s, scratch + omp_get_thread_num() * size);
        const int64_t Pp = w->Pp, Np = w->Np, Qp = w->Qp;
        memset(w->states, 0, sizeof(float) * HEADS * N * Pp);
        for (int64_t start = 0; start < T; start += Q) {
            int64_t n = T - start < Q ? T - start : Q;
            load_chunk(s, w, b, g, start, n);
            for (int64_t i = 0; i < heads; i++) {
                int64_t h = g * R + r + i;
                float *state = w->states + i * N * Pp, through = load_head(s, w, b, h, start, n);
                product(n, Pp, n, w->weights, Qp, 1, w->x, Pp, w->y, Pp, 1.0f, 0);
                if (start) {
                    product(n, Pp, N, w->C, Np, 1, state, Pp, w->weighed, Pp, 1.0f, 0);
                    scale_rows(w->y, w->weighed, w->from_start, n, Pp, 1);
                }
                for (int64_t j = 0; j < n * Pp; j += LANES)
                    put(w->y + j, first(w->y + j, LANES) + first(w->x + j, LANES) * D[h], LANES);
                rows_out(w->y, n, P, Pp, y + ((b * T + start) * H + h) * P, H * P);
                rows_out(state, N, P, Pp, before + ((start / Q * batch + b) * H + h) * N * P, P);
                if (start + n == T) continue;
                for (int64_t t = 0; t < Qp; t++) w->to_end[t] *= w->dt[t];
                scale_rows(w->weighed, w->x, w->to_end, n, Pp, 0);
                for (int64_t j = 0; j < N * Pp; j += LANES) put(state + j, first(state + j, LANES) * through, LANES);
                product(N, Pp, n, w->B, 1, Np, w->weighed, Pp, state, Pp, 1.0f, 1);
            }
        }
    }
}

/* What a chunk wrote, state' = through state + B^T (to_end dt x): adds to of_x, of_B, of_sums, of_dt of a head. */
static void backward_written(const scan *s, space *w, const float *state, float *of_state, int64_t n, float through) {
    const int64_t Pp = w->Pp, Np = w->Np, N = s->N;
    product(n, Pp, N, w->B, Np, 1, of_state, Pp, w->y, Pp, 1.0f, 0); /* dL/d(to_end dt x) */
    float of_last = through * dot(of_state, state, N * Pp);
    for (int64_t t = 0; t < n; t++) {
        float of_weight = dot(w->y + t * Pp, w->x + t * Pp, Pp) * w->to_end[t];
        w->of_dt[t] += of_weight;
        w->of_sums[t] -= of_weight * w->dt[t];
        of_last += of_weight * w->dt[t];
        w->to_end[t] *= w->dt[t];
    }
    w->of_sums[n - 1] += of_last;
    scale_rows(w->of_x, w->y, w->to_end, n, Pp, 1);
    scale_rows(w->weighed, w->x, w->to_end, n, Pp, 0);
    transpose(of_state, N, s->P, Pp, w->turned, Np);
    product(n, Np, s->P, w->weighed, Pp, 1, w->turned, Np, w->of_B, Np, 1.0f, 1);
    for (int64_t j = 0; j < N * Pp; j += LANES) put(of_state + j, first(of_state + j, LANES) * through, LANES);
}

/* What it read, y += from_start C state: adds to of_C, of_sums and of_state of a head. */
static void backward_read(const scan *s, space *w, const float *state, float *of_state, int64_t n) {
    const int64_t Pp = w->Pp, Np = w->Np, N = s->N;
    product(n, Pp, N, w->C, Np, 1, state, Pp, w->y, Pp, 1.0f, 0);
    for (int64_t t = 0; t < n; t++) w->of_sums[t] += w->from_start[t] * dot(w->y + t * Pp, w->grad + t * Pp, Pp);
    scale_rows(w->weighed, w->grad, w->from_start, n, Pp, 0);
    transpose(state, N, s->P, Pp, w->turned, Np);
    product(n, Np, s->P, w->weighed, Pp, 1, w->turned, Np, w->of_C, Np, 1.0f, 1);
    product(N, Pp, n, w->C, 1, Np, w->weighed, Pp, of_state, Pp, 1.0f, 1);
}

/* Within a chunk: sets of_x, of_sums and of_dt of a head, and adds to of_scores. */
static void backward_within(const scan *s, space *w, int64_t n) {
    const int64_t Pp = w->Pp, Qp = w->Qp;
    memset(w->x_t, 0, sizeof(float) * s->P * Qp);
    transpose(w->x, n, s->P, Pp, w->x_t, Qp);
    product(n, padded(n), s->P, w->grad, Pp, 1, w->x_t, Qp, w->of_weights, Qp, 1.0f, 0);
    product(n, Pp, n, w->weights, 1, Qp, w->grad, Pp, w->of_x, Pp, 1.0f, 0);
    memset(w->of_dt, 0, sizeof(float) * Qp);
    for (int64_t l = 0; l < n; l++) {
        vec of_sum = {0};
        for (int64_t c = 0; c <= l; c += LANES) {
            int64_t at = l * Qp + c;
            vec decayed = first(w->of_weights + at, LANES) * first(w->decay + at, LANES), dt = first(w->dt + c, LANES);
            vec of_dt = decayed * first(w->scores + at, LANES);
            if (l < c + LANES) { /* a token's own decay is 1, whatever the sums are: left in, it would cancel in digits */
                w->own[l] = of_dt[l - c];
                of_dt[l - c] = 0;
            }
            of_sum += of_dt * dt;
            put(w->of_dt + c, first(w->of_dt + c, LANES) + of_dt, LANES);
            put(w->of_scores + at, first(w->of_scores + at, LANES) + decayed * dt, LANES);
        }
        w->of_sums[l] = sum(of_sum);
    }
    for (int64_t t = 0; t < n; t++) {
        w->of_sums[t] -= w->of_dt[t] * w->dt[t];
        w->of_dt[t] += w->own[t];
    }
}

/* grad_B, grad_C (blocks of heads, batch, T, G, N) and grad_A, grad_D (batch, H) are for the caller to add up. */
void ssd_backward(const float *grad_y, const float *x, const float *dt, const float *A, const float *B, const float *C,
                  const float *D, const int32_t *begin, const float *before, float *grad_x, float *grad_dt, float *grad_A,
                  float *grad_B, float *grad_C, float *grad_D, float *scratch, int64_t size, int64_t batch, int64_t T, int64_t H, int64_t P, int64_t G,
                  int64_t N, int64_t Q, int64_t x_stride, int64_t B_stride, int64_t C_stride, int64_t threads) {
    const scan settings = {x, dt, A, B, C, D, begin, batch, T, H, P, G, N, Q, x_stride, B_stride, C_stride};
    const scan *s = &settings;
    const int64_t R = H / G, blocks = (R + HEADS - 1) / HEADS;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * G * blocks; unit++) {
        int64_t b = unit / (G * blocks), g = unit / blocks % G, block = unit % blocks, r = block * HEADS;
        int64_t heads = R - r < HEADS ? R - r : HEADS;
        space work, *w = &work;
        lay_out(w, s, scratch + omp_get_thread_num() * size);
        const int64_t Pp = w->Pp, Np = w->Np, Qp = w->Qp;
        float of_A[HEADS] = {0}, of_D[HEADS] = {0};
        memset(w->of_states, 0, sizeof(float) * HEADS * N * Pp);
        memset(w->turned, 0, sizeof(float) * P * Np);
        for (int64_t start = (T - 1) / Q * Q; start >= 0; start -= Q) {
            int64_t n = T - start < Q ? T - start : Q;
            load_chunk(s, w, b, g, start, n);
            memset(w->of_scores, 0, sizeof(float) * Q * Qp);
            memset(w->of_B, 0, sizeof(float) * Q * Np);
            memset(w->of_C, 0, sizeof(float) * Q * Np);
            for (int64_t i = 0; i < heads; i++) {
                int64_t h = g * R + r + i, at = b * T + start;
                float *state = w->states + i * N * Pp, *of_state = w->of_states + i * N * Pp;
                float through = load_head(s, w, b, h, start, n), running = 0;
                rows_in(before + ((start / Q * batch + b) * H + h) * N * P, N, P, P, state, Pp);
                rows_in(grad_y + (at * H + h) * P, n, P, H * P, w->grad, Pp);
                backward_within(s, w, n);
                of_D[i] += dot(w->grad, w->x, n * Pp);
                for (int64_t j = 0; j < n * Pp; j += LANES)
                    put(w->of_x + j, first(w->of_x + j, LANES) + first(w->grad + j, LANES) * D[h], LANES);
                if (start + n < T) backward_written(s, w, state, of_state, n, through);
                if (start) backward_read(s, w, state, of_state, n);
                rows_out(w->of_x, n, P, Pp, grad_x + (at * H + h) * P, H * P);
                for (int64_t t = n - 1; t >= 0; t--) { /* of a running sum */
                    running += w->of_sums[t];
                    grad_dt[(at + t) * H + h] = w->of_dt[t] + running * A[h];
                    of_A[i] += running * w->dt[t];
                    if (begin && begin[at + t] == start + t) running = 0;
                }
            }
            product(n, Np, n, w->of_scores, Qp, 1, w->B, Np, w->of_C, Np, 1.0f, 1);
            product(n, Np, n, w->of_scores, 1, Qp, w->C, Np, w->of_B, Np, 1.0f, 1);
            int64_t to = (((block * batch + b) * T + start) * G + g) * N;
            rows_out(w->of_B, n, N, Np, grad_B + to, G * N);
            rows_out(w->of_C, n, N, Np, grad_C + to, G * N);
        }
        for (int64_t i = 0; i < heads; i++) {
            grad_A[b * H + g * R + r + i] = of_A[i];
            grad_D[b * H + g * R + r + i] = of_D[i];
        }
    }
}
