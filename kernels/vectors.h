/* Vectors of floats for the kernels in C beside this file, in GCC's and Clang's extension for them: any processor will do,
   and the compiler splits a vector into what it has. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

#define LANES 16
#define VECTORS 4
#define BLOCK (LANES * VECTORS) /* channels that a thread takes at once */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline vec all(float value) { return (vec){0} + value; }

/* exp for x <= 0 to 1.2e-7, and 0 below 2^-126: 2^n 2^f with n whole and |f| <= 1/2, a Taylor polynomial for 2^f. */
static inline vec exp_below_zero(vec x) {
    const vec magic = all(12582912.0f), lowest = all(-126.0f);
    vec t = x * 1.44269504f;
    ints is_tiny = t <= lowest; /* not so for nan, which stays */
    t = (vec)(((ints)lowest & is_tiny) | ((ints)t & ~is_tiny));
    vec n = (t + magic) - magic;
    vec f = (x * 1.44269504f - n) + x * 1.92596299e-8f;
    vec p = all(1.54035304e-4f);
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return (vec)((ints)(p * (vec)power) & ~is_tiny);
}

static inline float sum(vec v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    union { vec all; eight halves[2]; } a = {v};
    union { eight all; four halves[2]; } b = {a.halves[0] + a.halves[1]};
    four c = b.halves[0] + b.halves[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* n floats, zeros after */
static inline vec first(const float *from, int64_t n) {
    vec v = {0};
    if (n == LANES) memcpy(&v, from, sizeof(v));
    else memcpy(&v, from, sizeof(float) * n);
    return v;
}

static inline void put(float *to, vec v, int64_t n) {
    if (n == LANES) memcpy(to, &v, sizeof(v));
    else memcpy(to, &v, sizeof(float) * n);
}

/* how many floats of a vector are left at the end of a row */
static inline int64_t lanes(int64_t left) { return left < LANES ? left : LANES; }

/* `width` floats, zeros up to BLOCK */
static inline void load(vec *to, const float *from, int64_t width) {
    if (width == BLOCK) { memcpy(to, from, sizeof(vec) * VECTORS); return; }
    memset(to, 0, sizeof(vec) * VECTORS);
    memcpy(to, from, sizeof(float) * width);
}

static inline void store(float *to, const vec *from, int64_t width) { memcpy(to, from, sizeof(float) * width); }

static inline vec sigmoid(vec x) {
    ints negative = x < all(0);
    vec e = exp_below_zero((vec)((ints)x | INT32_MIN)); /* exp(-|x|) */
    return (vec)(((ints)all(1.0f) & ~negative) | ((ints)e & negative)) / (1.0f + e);
}

/* the derivative of x sigmoid(x), from both */
static inline vec silu_slope(vec x, vec s) { return s * (1.0f + x * (1.0f - s)); }
