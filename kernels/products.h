/* Small matrix products whose operands lie in a processor's cache, and what softmax-like kernels do around them. */

#include "vectors.h"

#ifdef __AVX512F__
#define TILE 8 /* rows whose sums stay in registers */
#else
#define TILE 6
#endif

static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* TILE rows or fewer of c = [c +] factor a b, LANES columns: a[i * row + k * step], b[k * ldb], c[i * ldc] */
#define OF_ROWS(ROWS)                                                                                                  \
    case ROWS: {                                                                                                       \
        vec sums[ROWS];                                                                                                \
        for (int i = 0; i < ROWS; i++) sums[i] = all(0);                                                               \
        for (int64_t k = 0; k < K; k++) {                                                                              \
            vec b_k = first(b + k * ldb, LANES);                                                                       \
            for (int i = 0; i < ROWS; i++) sums[i] += b_k * a[i * row + k * step];                                     \
        }                                                                                                              \
        for (int i = 0; i < ROWS; i++)                                                                                 \
            put(c + i * ldc, adds ? first(c + i * ldc, LANES) + sums[i] * factor : sums[i] * factor, LANES);           \
        break;                                                                                                         \
    }

static inline void tile(int64_t rows, int64_t K, const float *a, int64_t row, int64_t step, const float *b,
                        int64_t ldb, float *c, int64_t ldc, float factor, int adds) {
    switch (rows) { OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6) OF_ROWS(7) OF_ROWS(8) }
}

/* c (M, N) = [c +] factor a (M, K) b (K, N), N a multiple of LANES; b and c row by row, a with any strides */
static void product(int64_t M, int64_t N, int64_t K, const float *a, int64_t row, int64_t step, const float *b,
                    int64_t ldb, float *c, int64_t ldc, float factor, int adds) {
    for (int64_t n = 0; n < N; n += LANES)
        for (int64_t m = 0; m < M; m += TILE)
            tile(M - m < TILE ? M - m : TILE, K, a + m * row, row, step, b + n, ldb, c + m * ldc + n, ldc, factor, adds);
}

/* (rows, columns) with `stride` floats from row to row -> the transpose, `to_stride` floats from row to row */
static void transpose(const float *from, int64_t rows, int64_t columns, int64_t stride, float *to, int64_t to_stride) {
    for (int64_t j = 0; j < columns; j += LANES)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t l = j; l < columns && l < j + LANES; l++) to[l * to_stride + i] = from[i * stride + l];
}
