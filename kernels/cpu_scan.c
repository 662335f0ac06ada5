/* Mamba-1's selective scan on a CPU, forward and backward; kernels/cpu_scan.py compiles and calls it.

       h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t        y_t = C_t h_t        (Gu & Dao 2023, eq. 2 and 4)

   x, dt, y (batch, T, D); B, C (batch, T, N); A (N, D); state, last (batch, N, D); keep (batch, T), 0 where a document
   starts, or NULL; before (chunks, batch, N, D), the states before every Q tokens. All float32 and contiguous.
   One thread walks through time with the states of BLOCK channels of one sequence, which its cache holds. Sums over
   channels are made block by block and added up by the caller: the bits do not depend on the number of threads. */

#include "vectors.h"

static void load_rows(vec *to, const float *from, int64_t N, int64_t D, int64_t width) {
    for (int64_t n = 0; n < N; n++) load(to + n * VECTORS, from + n * D, width);
}

static void store_rows(float *to, const vec *from, int64_t N, int64_t D, int64_t width) {
    for (int64_t n = 0; n < N; n++) store(to + n * D, from + n * VECTORS, width);
}

/* floats that a thread needs: A, two states of what is carried, decays and states of a chunk (cpu_scan.py allocates) */
static int64_t scratch_of(int64_t N, int64_t Q) { return BLOCK * N * (2 * Q + 4); }

void scan_forward(const float *x, const float *dt, const float *B, const float *C, const float *A, const float *state,
                  const float *keep, float *y, float *last, float *before, float *scratch,
                  int64_t batch, int64_t T, int64_t D, int64_t N, int64_t Q, int64_t threads) {
    int64_t blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * blocks; unit++) {
        int64_t b = unit / blocks, d = unit % blocks * BLOCK, width = D - d < BLOCK ? D - d : BLOCK;
        vec *a = (vec *)(scratch + omp_get_thread_num() * scratch_of(N, Q)), *h = a + N * VECTORS;
        load_rows(a, A + d, N, D, width);
        load_rows(h, state + b * N * D + d, N, D, width);
        for (int64_t t = 0; t < T; t++) {
            if (t % Q == 0) store_rows(before + (t / Q * batch + b) * N * D + d, h, N, D, width);
            int64_t at = b * T + t;
            const float *B_t = B + at * N, *C_t = C + at * N;
            float kept = keep ? keep[at] : 1.0f;
            vec xs[VECTORS], dts[VECTORS], total[VECTORS] = {{0}};
            load(xs, x + at * D + d, width);
            load(dts, dt + at * D + d, width);
            for (int v = 0; v < VECTORS; v++) xs[v] *= dts[v];
            for (int64_t n = 0; n < N; n++)
                for (int v = 0; v < VECTORS; v++) {
                    vec decay = exp_below_zero(dts[v] * a[n * VECTORS + v]) * kept;
                    vec new = decay * h[n * VECTORS + v] + xs[v] * B_t[n];
                    h[n * VECTORS + v] = new;
                    total[v] += new * C_t[n];
                }
            store(y + at * D + d, total, width);
        }
        store_rows(last + b * N * D + d, h, N, D, width);
    }
}

/* Chunk by chunk from the end: the decays and states again, then g_(t-1) = exp(dt_t A) g_t + C_(t-1) dy_(t-1) for
   g = dL/dh. grad_B, grad_C (blocks, batch, T, N); grad_A (batch, N, D). */
void scan_backward(const float *grad_y, const float *grad_last, const float *x, const float *dt, const float *B,
                   const float *C, const float *A, const float *before, const float *keep, float *grad_x,
                   float *grad_dt, float *grad_B, float *grad_C, float *grad_A, float *grad_state, float *scratch,
                   int64_t batch, int64_t T, int64_t D, int64_t N, int64_t Q, int64_t threads) {
    int64_t blocks = (D + BLOCK - 1) / BLOCK, rows = N * VECTORS;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < batch * blocks; unit++) {
        int64_t b = unit / blocks, block = unit % blocks, d = block * BLOCK, width = D - d < BLOCK ? D - d : BLOCK;
        vec *a = (vec *)(scratch + omp_get_thread_num() * scratch_of(N, Q)), *g = a + rows, *g_A = g + rows;
        vec *decays = g_A + rows, *states = decays + Q * rows;
        load_rows(a, A + d, N, D, width);
        load_rows(g, grad_last + b * N * D + d, N, D, width);
        memset(g_A, 0, sizeof(vec) * rows);
        for (int64_t c = (T + Q - 1) / Q - 1; c >= 0; c--) {
            int64_t start = c * Q, tokens = T - start < Q ? T - start : Q;
            load_rows(states, before + (c * batch + b) * N * D + d, N, D, width);
            for (int64_t j = 0; j < tokens; j++) {
                int64_t at = b * T + start + j;
                float kept = keep ? keep[at] : 1.0f;
                vec xs[VECTORS], dts[VECTORS], *decay = decays + j * rows, *h = states + j * rows;
                load(xs, x + at * D + d, width);
                load(dts, dt + at * D + d, width);
                for (int v = 0; v < VECTORS; v++) xs[v] *= dts[v];
                for (int64_t n = 0; n < N; n++)
                    for (int v = 0; v < VECTORS; v++) {
                        int64_t i = n * VECTORS + v;
                        decay[i] = exp_below_zero(dts[v] * a[i]) * kept;
                        h[rows + i] = decay[i] * h[i] + xs[v] * B[at * N + n];
                    }
            }
            for (int64_t j = tokens - 1; j >= 0; j--) {
                int64_t at = b * T + start + j, sums = (block * batch * T + at) * N;
                vec xs[VECTORS], dts[VECTORS], dys[VECTORS], written[VECTORS], of_written[VECTORS] = {{0}};
                vec of_dt[VECTORS] = {{0}}, *decay = decays + j * rows, *h = states + j * rows;
                load(xs, x + at * D + d, width);
                load(dts, dt + at * D + d, width);
                load(dys, grad_y + at * D + d, width);
                for (int v = 0; v < VECTORS; v++) written[v] = xs[v] * dts[v];
                for (int64_t n = 0; n < N; n++) {
                    float B_n = B[at * N + n], C_n = C[at * N + n];
                    vec of_B = {0}, of_C = {0};
                    for (int v = 0; v < VECTORS; v++) {
                        int64_t i = n * VECTORS + v;
                        vec now = g[i] + dys[v] * C_n, passed = now * decay[i], exponent = passed * h[i];
                        of_C += h[rows + i] * dys[v];
                        of_B += now * written[v];
                        of_written[v] += now * B_n;
                        of_dt[v] += exponent * a[i];
                        g_A[i] += exponent * dts[v];
                        g[i] = passed;
                    }
                    grad_B[sums + n] = sum(of_B);
                    grad_C[sums + n] = sum(of_C);
                }
                for (int v = 0; v < VECTORS; v++) {
                    of_dt[v] += of_written[v] * xs[v];
                    of_written[v] *= dts[v];
                }
                store(grad_x + at * D + d, of_written, width);
                store(grad_dt + at * D + d, of_dt, width);
            }
        }
        store_rows(grad_A + b * N * D + d, g_A, N, D, width);
        store_rows(grad_state + b * N * D + d, g, N, D, width);
    }
}
