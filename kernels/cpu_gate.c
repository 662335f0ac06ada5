/* Mamba-2's gated norm; kernels/cpu_gate.py compiles and calls it.

       y = weight u / sqrt(mean(u^2) + eps), u = x z sigmoid(z), for each row

   x, y (rows, C); z (rows, C) with `stride` floats from row to row; weight (C); scale (rows): 1 / sqrt(...). */

#include "vectors.h"

#define ROWS 64 /* of a unit of work: the sums of the weight's gradient are made for each; cpu_gate.py knows it too */

void gate_forward(const float *x, const float *z, const float *weight, const float *eps, float *y, float *scale,
                  int64_t rows, int64_t C, int64_t stride, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < rows; row++) {
        float *to = y + row * C;
        vec squares = {0};
        for (int64_t d = 0; d < C; d += LANES) {
            int64_t n = lanes(C - d);
            vec gate = first(z + row * stride + d, n), u = first(x + row * C + d, n) * gate * sigmoid(gate);
            squares += u * u;
            put(to + d, u, n);
        }
        scale[row] = 1.0f / sqrtf(sum(squares) / C + *eps);
        for (int64_t d = 0; d < C; d += LANES) {
            int64_t n = lanes(C - d);
            vec normed = first(to + d, n) * scale[row] * first(weight + d, n);
            put(to + d, normed, n);
        }
    }
}

/* grad_weight (rows / ROWS, C), for the caller to add up */
void gate_backward(const float *grad_y, const float *x, const float *z, const float *weight, const float *scale,
                   float *grad_x, float *grad_z, float *grad_weight, int64_t rows, int64_t C, int64_t stride,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t unit = 0; unit < (rows + ROWS - 1) / ROWS; unit++) {
        float *of_weight = grad_weight + unit * C;
        memset(of_weight, 0, sizeof(float) * C);
        for (int64_t row = unit * ROWS; row < rows && row < (unit + 1) * ROWS; row++) {
            const float *g = grad_y + row * C, *x_row = x + row * C, *z_row = z + row * stride;
            float *to_x = grad_x + row * C, *to_z = grad_z + row * C, r = scale[row];
            vec along = {0};
            for (int64_t d = 0; d < C; d += LANES) { /* sigmoid(z) waits in grad_z */
                int64_t n = lanes(C - d);
                vec gate = first(z_row + d, n), s = sigmoid(gate), u = first(x_row + d, n) * gate * s;
                vec grad = first(g + d, n), weighted = first(of_weight + d, n) + grad * u * r;
                along += grad * first(weight + d, n) * u;
                put(to_z + d, s, n);
                put(of_weight + d, weighted, n);
            }
            float less = sum(along) * r * r * r / C;
            for (int64_t d = 0; d < C; d += LANES) {
                int64_t n = lanes(C - d);
                vec gate = first(z_row + d, n), s = first(to_z + d, n), xs = first(x_row + d, n), silu = gate * s;
                vec of_u = first(g + d, n) * first(weight + d, n) * r - xs * silu * less;
                vec of_x = of_u * silu, of_z = of_u * xs * silu_slope(gate, s);
                put(to_x + d, of_x, n);
                put(to_z + d, of_z, n);
            }
        }
    }
}
