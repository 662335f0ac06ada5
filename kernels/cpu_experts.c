/* What experts do between their two products, for a gated FFN with silu; kernels/cpu_experts.py compiles and calls it.

       a = w silu(gate) up        for each row, w being the router's weight for it

   hidden (rows, 2H): gate, then up; a (rows, H); weights (rows). */

#include "vectors.h"

void gated_forward(const float *hidden, const float *weights, float *a, int64_t rows, int64_t H, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = hidden + row * 2 * H, *up = gate + H;
        for (int64_t d = 0; d < H; d += LANES) {
            int64_t n = lanes(H - d);
            vec g = first(gate + d, n);
            put(a + row * H + d, g * sigmoid(g) * first(up + d, n) * weights[row], n);
        }
    }
}

void gated_backward(const float *grad_a, const float *hidden, const float *weights, float *grad_hidden,
                    float *grad_weights, int64_t rows, int64_t H, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = hidden + row * 2 * H, *up = gate + H;
        float *of_gate = grad_hidden + row * 2 * H, *of_up = of_gate + H, w = weights[row];
        vec of_weight = {0};
        for (int64_t d = 0; d < H; d += LANES) {
            int64_t n = lanes(H - d);
            vec g = first(gate + d, n), s = sigmoid(g), u = first(up + d, n), grad = first(grad_a + row * H + d, n);
            of_weight += grad * g * s * u;
            put(of_up + d, grad * g * s * w, n);
            put(of_gate + d, grad * u * silu_slope(g, s) * w, n);
        }
        grad_weights[row] = sum(of_weight);
    }
}
