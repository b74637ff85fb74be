/* The vector vocabulary, defined once per ISA: vf holds VF_LANES float32, vd holds VD_LANES float64. Private to src_c.
 *
 *   set1 add sub mul          one rounding per operation, never fused
 *   add_fma(a, b)             a + b as fma(a, 1, b): the same bits as add, on other execution units. docs/numerics.md: no fused products.
 *   lt(a, b, x, y)            a < b ? x : y per lane, so a NaN in a or b selects y; le likewise
 *   keep(v, k)                lanes 0..k-1 of v, zeros behind them
 *   join(k, a, b)             lanes 0..k-1 of a, the others of b
 *   once(v)                   v, which on x86 is then in a register: a compiler would load v again for each use, and a load that meets two
 *                             cache lines costs twice
 *   across(k, a, b)           lanes k, k+1, ... of a, then the first k of b (AVX-512 alone)
 *   add_to(sums, v)           sums[i] += v[i] in float64
 *   sums_of_rows(sums, rows, count)   sums[i] = the 16 values of row i, added in halves: j + (j+8) first, then 4, 2, 1
 *   load store stream         _<storage>: f32 f64 f16 bf16; a streaming store passes the cache by and needs an address that is a multiple
 *                             of the bytes stored. A NaN that is stored as bf16 must have zeros in the bits that are dropped: see
 *                             round_constant_f32 in channels.h
 *   load_part store_part      the first k lanes only; nothing behind them is read or written
 *   load_from                 the lanes from k on only; nothing before them is read (AVX-512 alone)
 *
 * A file that includes this header defines one of FBN_SCALAR, FBN_SSE2, FBN_AVX2, FBN_AVX512, FBN_NEON and sets the target first. */
#include "half.h"

#include <stdint.h>
#include <string.h>

#define VEC static inline __attribute__((always_inline, unused))
#define OP(result, name, arguments, value)                                                                                                 \
    VEC result name arguments {                                                                                                            \
        return value;                                                                                                                      \
    }
#define DO(name, arguments, statement)                                                                                                     \
    VEC void name arguments {                                                                                                              \
        statement;                                                                                                                         \
    }

#if defined(FBN_SCALAR) || defined(FBN_SSE2)
/* These ISAs have no instruction for the conversion, and the code in integers is too long to inline. */
static __attribute__((noinline, unused)) float f16_to_f32(uint16_t half) {
    return (float)f16_to_f64(half);
}
static __attribute__((noinline, unused)) uint16_t f32_to_f16(float value) {
    return f64_to_f16(value);
}
#endif

#if defined(FBN_SCALAR)

static __attribute__((noinline, unused)) float bf16_to_f32(uint16_t half) {
    return (float)bf16_to_f64(half);
}
static __attribute__((noinline, unused)) uint16_t f32_to_bf16(float value) {
    return f64_to_bf16(value);
}

#define VF_LANES 1
#define VD_LANES 1
typedef float vf;
typedef double vd;
#define SCALAR(V)                                                                                                                          \
    OP(V, V##_set1, (V a), a)                                                                                                              \
    OP(V, V##_add, (V a, V b), a + b)                                                                                                      \
    OP(V, V##_add_fma, (V a, V b), a + b)                                                                                                  \
    OP(V, V##_once, (V a), a)                                                                                                              \
    OP(V, V##_sub, (V a, V b), a - b)                                                                                                      \
    OP(V, V##_mul, (V a, V b), a *b)                                                                                                       \
    OP(V, V##_lt, (V a, V b, V x, V y), a < b ? x : y)                                                                                     \
    OP(V, V##_le, (V a, V b, V x, V y), a <= b ? x : y)                                                                                    \
    OP(V, V##_keep, (V a, int64_t k), k > 0 ? a : 0)                                                                                       \
    OP(V, V##_join, (int64_t k, V a, V b), k > 0 ? a : b)                                                                                  \
    DO(V##_add_to, (double *sums, V a), *sums += a)
SCALAR(vf)
SCALAR(vd)
OP(vf, vf_load_f32, (const float *p), *p)
OP(vd, vd_load_f64, (const double *p), *p)
OP(vf, vf_load_f16, (const uint16_t *p), f16_to_f32(*p))
OP(vf, vf_load_bf16, (const uint16_t *p), bf16_to_f32(*p))
DO(vf_store_f32, (float *p, vf a), *p = a)
DO(vd_store_f64, (double *p, vd a), *p = a)
DO(vf_store_f16, (uint16_t *p, vf a), *p = f32_to_f16(a))
DO(vf_store_bf16, (uint16_t *p, vf a), *p = f32_to_bf16(a))

#elif defined(FBN_SSE2)

#include <emmintrin.h>
#define VF_LANES 4
#define VD_LANES 2
typedef __m128 vf;
typedef __m128d vd;
#define SELECT(ps, mask, x, y) _mm_or_##ps(_mm_and_##ps(mask, x), _mm_andnot_##ps(mask, y))
#define BELOW(iota, k) _mm_cmplt_epi32(iota, _mm_set1_epi32((int)(k)))
#define SSE2(V, E, ps)                                                                                                                     \
    OP(V, V##_set1, (E a), _mm_set1_##ps(a))                                                                                               \
    OP(V, V##_add, (V a, V b), _mm_add_##ps(a, b))                                                                                         \
    OP(V, V##_add_fma, (V a, V b), _mm_add_##ps(a, b))                                                                                     \
    OP(V, V##_once, (V a), ({                                                                                                              \
           __asm__("" : "+x"(a));                                                                                                          \
           a;                                                                                                                              \
       }))                                                                                                                                 \
    OP(V, V##_sub, (V a, V b), _mm_sub_##ps(a, b))                                                                                         \
    OP(V, V##_mul, (V a, V b), _mm_mul_##ps(a, b))                                                                                         \
    OP(V, V##_lt, (V a, V b, V x, V y), SELECT(ps, _mm_cmplt_##ps(a, b), x, y))                                                            \
    OP(V, V##_le, (V a, V b, V x, V y), SELECT(ps, _mm_cmple_##ps(a, b), x, y))
SSE2(vf, float, ps)
SSE2(vd, double, pd)
OP(vf, vf_keep, (vf a, int64_t k), _mm_and_ps(_mm_castsi128_ps(BELOW(_mm_setr_epi32(0, 1, 2, 3), k)), a))
OP(vd, vd_keep, (vd a, int64_t k), _mm_and_pd(_mm_castsi128_pd(BELOW(_mm_setr_epi32(0, 0, 1, 1), k)), a))
OP(vf, vf_join, (int64_t k, vf a, vf b), SELECT(ps, _mm_castsi128_ps(BELOW(_mm_setr_epi32(0, 1, 2, 3), k)), a, b))
OP(vd, vd_join, (int64_t k, vd a, vd b), SELECT(pd, _mm_castsi128_pd(BELOW(_mm_setr_epi32(0, 0, 1, 1), k)), a, b))
DO(vd_add_to, (double *sums, vd a), _mm_storeu_pd(sums, _mm_add_pd(_mm_loadu_pd(sums), a)))
VEC void vf_add_to(double *sums, vf a) {
    vd_add_to(sums, _mm_cvtps_pd(a));
    vd_add_to(sums + 2, _mm_cvtps_pd(_mm_movehl_ps(a, a)));
}
OP(vf, vf_load_f32, (const float *p), _mm_loadu_ps(p))
OP(vd, vd_load_f64, (const double *p), _mm_loadu_pd(p))
OP(vf, vf_load_f16, (const uint16_t *p), _mm_setr_ps(f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])))
OP(vf, vf_load_bf16, (const uint16_t *p), _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p))))
DO(vf_store_f32, (float *p, vf a), _mm_storeu_ps(p, a))
DO(vd_store_f64, (double *p, vd a), _mm_storeu_pd(p, a))
DO(vf_stream_f32, (float *p, vf a), _mm_stream_ps(p, a))
DO(vd_stream_f64, (double *p, vd a), _mm_stream_pd(p, a))
VEC void vf_store_f16(uint16_t *p, vf a) {
    float lanes[4];
    _mm_storeu_ps(lanes, a);
    for (int i = 0; i < 4; i++)
        p[i] = f32_to_f16(lanes[i]);
}
VEC void vf_store_bf16(uint16_t *p, vf a) {
    const __m128i bits = _mm_castps_si128(a), even = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), even);
    const __m128i halves = _mm_srai_epi32(rounded, 16);
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi32(halves, halves));
}

#elif defined(FBN_AVX2)

#include <immintrin.h>
#define VF_LANES 8
#define VD_LANES 4
typedef __m256 vf;
typedef __m256d vd;
#define AVX2(V, E, ps)                                                                                                                     \
    OP(V, V##_set1, (E a), _mm256_set1_##ps(a))                                                                                            \
    OP(V, V##_add, (V a, V b), _mm256_add_##ps(a, b))                                                                                      \
    OP(V, V##_add_fma, (V a, V b), _mm256_fmadd_##ps(a, _mm256_set1_##ps(1), b))                                                           \
    OP(V, V##_once, (V a), ({                                                                                                              \
           __asm__("" : "+x"(a));                                                                                                          \
           a;                                                                                                                              \
       }))                                                                                                                                 \
    OP(V, V##_sub, (V a, V b), _mm256_sub_##ps(a, b))                                                                                      \
    OP(V, V##_mul, (V a, V b), _mm256_mul_##ps(a, b))                                                                                      \
    OP(V, V##_lt, (V a, V b, V x, V y), _mm256_blendv_##ps(y, x, _mm256_cmp_##ps(a, b, _CMP_LT_OQ)))                                       \
    OP(V, V##_le, (V a, V b, V x, V y), _mm256_blendv_##ps(y, x, _mm256_cmp_##ps(a, b, _CMP_LE_OQ)))
AVX2(vf, float, ps)
AVX2(vd, double, pd)
OP(__m256i, mask_f32, (int64_t k), _mm256_cmpgt_epi32(_mm256_set1_epi32((int)k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
OP(__m256i, mask_f64, (int64_t k), _mm256_cmpgt_epi64(_mm256_set1_epi64x(k), _mm256_setr_epi64x(0, 1, 2, 3)))
OP(vf, vf_keep, (vf a, int64_t k), _mm256_and_ps(_mm256_castsi256_ps(mask_f32(k)), a))
OP(vd, vd_keep, (vd a, int64_t k), _mm256_and_pd(_mm256_castsi256_pd(mask_f64(k)), a))
OP(vf, vf_join, (int64_t k, vf a, vf b), _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask_f32(k))))
OP(vd, vd_join, (int64_t k, vd a, vd b), _mm256_blendv_pd(b, a, _mm256_castsi256_pd(mask_f64(k))))
OP(vf, vf_load_part_f32, (const float *p, int64_t k), _mm256_maskload_ps(p, mask_f32(k)))
OP(vd, vd_load_part_f64, (const double *p, int64_t k), _mm256_maskload_pd(p, mask_f64(k)))
DO(vf_store_part_f32, (float *p, vf a, int64_t k), _mm256_maskstore_ps(p, mask_f32(k), a))
DO(vd_store_part_f64, (double *p, vd a, int64_t k), _mm256_maskstore_pd(p, mask_f64(k), a))
DO(vd_add_to, (double *sums, vd a), _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), a)))
VEC void vf_add_to(double *sums, vf a) {
    vd_add_to(sums, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    vd_add_to(sums + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
OP(__m128i, load_8_halves, (const uint16_t *p), _mm_loadu_si128((const __m128i *)p))
OP(vf, vf_load_f32, (const float *p), _mm256_loadu_ps(p))
OP(vd, vd_load_f64, (const double *p), _mm256_loadu_pd(p))
OP(vf, vf_load_f16, (const uint16_t *p), _mm256_cvtph_ps(load_8_halves(p)))
/* bf16 is the upper half of a float32. One byte shuffle moves the halves, and a comparison instead of a shift finds the even ones: a core
 * has few units for shifts and shuffles. */
VEC vf vf_load_bf16(const uint16_t *p) {
    const __m256i to_upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10, 11, -1, -1,
                                              12, 13, -1, -1, 14, 15);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_8_halves(p)), to_upper));
}
VEC __m128i vf_to_bf16(vf a) {
    const __m256i from_upper =
        _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i bits = _mm256_castps_si256(a), last = _mm256_and_si256(bits, _mm256_set1_epi32(0x10000));
    const __m256i minus_even = _mm256_cmpeq_epi32(last, _mm256_setzero_si256());
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), minus_even);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(rounded, from_upper), 0x08));
}
OP(__m128i, vf_to_f16, (vf a), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
DO(vf_store_f32, (float *p, vf a), _mm256_storeu_ps(p, a))
DO(vd_store_f64, (double *p, vd a), _mm256_storeu_pd(p, a))
DO(vf_store_f16, (uint16_t *p, vf a), _mm_storeu_si128((__m128i *)p, vf_to_f16(a)))
DO(vf_store_bf16, (uint16_t *p, vf a), _mm_storeu_si128((__m128i *)p, vf_to_bf16(a)))
DO(vf_stream_f32, (float *p, vf a), _mm256_stream_ps(p, a))
DO(vd_stream_f64, (double *p, vd a), _mm256_stream_pd(p, a))
DO(vf_stream_f16, (uint16_t *p, vf a), _mm_stream_si128((__m128i *)p, vf_to_f16(a)))
DO(vf_stream_bf16, (uint16_t *p, vf a), _mm_stream_si128((__m128i *)p, vf_to_bf16(a)))

#elif defined(FBN_AVX512)

#include <immintrin.h>
#define VF_LANES 16
#define VD_LANES 8
typedef __m512 vf;
typedef __m512d vd;
#define AVX512(V, E, ps, M)                                                                                                                \
    OP(V, V##_set1, (E a), _mm512_set1_##ps(a))                                                                                            \
    OP(V, V##_add, (V a, V b), _mm512_add_##ps(a, b))                                                                                      \
    OP(V, V##_add_fma, (V a, V b), _mm512_fmadd_##ps(a, _mm512_set1_##ps(1), b))                                                           \
    OP(V, V##_once, (V a), ({                                                                                                              \
           __asm__("" : "+v"(a));                                                                                                          \
           a;                                                                                                                              \
       }))                                                                                                                                 \
    OP(V, V##_sub, (V a, V b), _mm512_sub_##ps(a, b))                                                                                      \
    OP(V, V##_mul, (V a, V b), _mm512_mul_##ps(a, b))                                                                                      \
    OP(V, V##_lt, (V a, V b, V x, V y), _mm512_mask_blend_##ps(_mm512_cmp_##ps##_mask(a, b, _CMP_LT_OQ), y, x))                            \
    OP(V, V##_le, (V a, V b, V x, V y), _mm512_mask_blend_##ps(_mm512_cmp_##ps##_mask(a, b, _CMP_LE_OQ), y, x))                            \
    OP(M, V##_mask, (int64_t k), (M)(k <= 0 ? 0 : k >= V##_lanes ? -1 : (1 << k) - 1))                                                     \
    OP(V, V##_keep, (V a, int64_t k), _mm512_maskz_mov_##ps(V##_mask(k), a))                                                               \
    OP(V, V##_join, (int64_t k, V a, V b), _mm512_mask_blend_##ps(V##_mask(k), b, a))
enum { vf_lanes = VF_LANES, vd_lanes = VD_LANES };
AVX512(vf, float, ps, __mmask16)
AVX512(vd, double, pd, __mmask8)
DO(vd_add_to, (double *sums, vd a), _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), a)))
VEC void vf_add_to(double *sums, vf a) {
    vd_add_to(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    vd_add_to(sums + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
}
/* bf16 is the upper half of a float32: one permutation of words moves it there, and one moves it back. */
VEC vf bf16_to_vf(__m256i a) {
    const __m512i to_upper =
        _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_upper, _mm512_castsi256_si512(a)));
}
OP(__m256i, load_16_halves, (const uint16_t *p), _mm256_loadu_si256((const __m256i *)p))
OP(vf, vf_load_f32, (const float *p), _mm512_loadu_ps(p))
OP(vd, vd_load_f64, (const double *p), _mm512_loadu_pd(p))
OP(vf, vf_load_f16, (const uint16_t *p), _mm512_cvtph_ps(load_16_halves(p)))
OP(vf, vf_load_bf16, (const uint16_t *p), bf16_to_vf(load_16_halves(p)))
VEC __m256i vf_to_bf16(vf a) {
    const __m512i bits = _mm512_castps_si512(a), rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_mask_sub_epi32(rounded, odd, rounded, _mm512_set1_epi32(-1));
    const __m512i from_upper = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23, 21, 19, 17,
                                                15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(from_upper, even));
}
OP(__m256i, vf_to_f16, (vf a), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
DO(vf_store_f32, (float *p, vf a), _mm512_storeu_ps(p, a))
DO(vd_store_f64, (double *p, vd a), _mm512_storeu_pd(p, a))
DO(vf_store_f16, (uint16_t *p, vf a), _mm256_storeu_si256((__m256i *)p, vf_to_f16(a)))
DO(vf_store_bf16, (uint16_t *p, vf a), _mm256_storeu_si256((__m256i *)p, vf_to_bf16(a)))
DO(vf_stream_f32, (float *p, vf a), _mm512_stream_ps(p, a))
DO(vd_stream_f64, (double *p, vd a), _mm512_stream_pd(p, a))
DO(vf_stream_f16, (uint16_t *p, vf a), _mm256_stream_si256((__m256i *)p, vf_to_f16(a)))
DO(vf_stream_bf16, (uint16_t *p, vf a), _mm256_stream_si256((__m256i *)p, vf_to_bf16(a)))
OP(vf, vf_load_part_f32, (const float *p, int64_t k), _mm512_maskz_loadu_ps(vf_mask(k), p))
OP(vd, vd_load_part_f64, (const double *p, int64_t k), _mm512_maskz_loadu_pd(vd_mask(k), p))
OP(vf, vf_load_part_f16, (const uint16_t *p, int64_t k), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vf_mask(k), p)))
OP(vf, vf_load_part_bf16, (const uint16_t *p, int64_t k), bf16_to_vf(_mm256_maskz_loadu_epi16(vf_mask(k), p)))
OP(vf, vf_load_from_f32, (const float *p, int64_t k), _mm512_maskz_loadu_ps((__mmask16)~vf_mask(k), p))
OP(vd, vd_load_from_f64, (const double *p, int64_t k), _mm512_maskz_loadu_pd((__mmask8)~vd_mask(k), p))
OP(vf, vf_load_from_f16, (const uint16_t *p, int64_t k), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)~vf_mask(k), p)))
OP(vf, vf_load_from_bf16, (const uint16_t *p, int64_t k), bf16_to_vf(_mm256_maskz_loadu_epi16((__mmask16)~vf_mask(k), p)))
OP(__m512i, lanes_32, (void), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
OP(__m512i, lanes_64, (void), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0))
OP(vf, vf_across, (int64_t k, vf a, vf b), _mm512_permutex2var_ps(a, _mm512_add_epi32(lanes_32(), _mm512_set1_epi32((int)k)), b))
OP(vd, vd_across, (int64_t k, vd a, vd b), _mm512_permutex2var_pd(a, _mm512_add_epi64(lanes_64(), _mm512_set1_epi64(k)), b))
DO(vf_store_part_f32, (float *p, vf a, int64_t k), _mm512_mask_storeu_ps(p, vf_mask(k), a))
DO(vd_store_part_f64, (double *p, vd a, int64_t k), _mm512_mask_storeu_pd(p, vd_mask(k), a))
DO(vf_store_part_f16, (uint16_t *p, vf a, int64_t k), _mm256_mask_storeu_epi16(p, vf_mask(k), vf_to_f16(a)))
DO(vf_store_part_bf16, (uint16_t *p, vf a, int64_t k), _mm256_mask_storeu_epi16(p, vf_mask(k), vf_to_bf16(a)))

#elif defined(FBN_NEON)

#include <arm_neon.h>
#define VF_LANES 4
#define VD_LANES 2
typedef float32x4_t vf;
typedef float64x2_t vd;
#define NEON(V, E, f32)                                                                                                                    \
    OP(V, V##_set1, (E a), vdupq_n_##f32(a))                                                                                               \
    OP(V, V##_add, (V a, V b), vaddq_##f32(a, b))                                                                                          \
    OP(V, V##_add_fma, (V a, V b), vaddq_##f32(a, b))                                                                                      \
    OP(V, V##_once, (V a), a)                                                                                                              \
    OP(V, V##_sub, (V a, V b), vsubq_##f32(a, b))                                                                                          \
    OP(V, V##_mul, (V a, V b), vmulq_##f32(a, b))                                                                                          \
    OP(V, V##_lt, (V a, V b, V x, V y), vbslq_##f32(vcltq_##f32(a, b), x, y))                                                              \
    OP(V, V##_le, (V a, V b, V x, V y), vbslq_##f32(vcleq_##f32(a, b), x, y))
NEON(vf, float, f32)
NEON(vd, double, f64)
static const int32_t IOTA_32[4] = {0, 1, 2, 3};
static const int64_t IOTA_64[2] = {0, 1};
OP(vf, vf_keep, (vf a, int64_t k), vbslq_f32(vcltq_s32(vld1q_s32(IOTA_32), vdupq_n_s32((int32_t)k)), a, vdupq_n_f32(0)))
OP(vd, vd_keep, (vd a, int64_t k), vbslq_f64(vcltq_s64(vld1q_s64(IOTA_64), vdupq_n_s64(k)), a, vdupq_n_f64(0)))
OP(vf, vf_join, (int64_t k, vf a, vf b), vbslq_f32(vcltq_s32(vld1q_s32(IOTA_32), vdupq_n_s32((int32_t)k)), a, b))
OP(vd, vd_join, (int64_t k, vd a, vd b), vbslq_f64(vcltq_s64(vld1q_s64(IOTA_64), vdupq_n_s64(k)), a, b))
DO(vd_add_to, (double *sums, vd a), vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), a)))
VEC void vf_add_to(double *sums, vf a) {
    vd_add_to(sums, vcvt_f64_f32(vget_low_f32(a)));
    vd_add_to(sums + 2, vcvt_high_f64_f32(a));
}
OP(vf, vf_load_f32, (const float *p), vld1q_f32(p))
OP(vd, vd_load_f64, (const double *p), vld1q_f64(p))
OP(vf, vf_load_f16, (const uint16_t *p), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
OP(vf, vf_load_bf16, (const uint16_t *p), vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)))
DO(vf_store_f32, (float *p, vf a), vst1q_f32(p, a))
DO(vd_store_f64, (double *p, vd a), vst1q_f64(p, a))
DO(vf_store_f16, (uint16_t *p, vf a), vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))))
VEC void vf_store_bf16(uint16_t *p, vf a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a), even = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), even);
    vst1_u16(p, vshrn_n_u32(rounded, 16));
}

#endif

/* Sums of 16 rows at once: each step takes two vectors of halves, one of the first and one of the second half of what is left of two sets
 * of rows, and adds them. DEALT_ROW is the order of rows that leaves the sums in theirs: each step deals them out like cards. */
#define DEALT_ROW(i) rows[((i) & 1) << 1 | ((i) & 2) >> 1 | FAR_ROW((i) & 12)]
#if defined(FBN_AVX512)
#define FAR_ROW(i) (((i) & 4) << 1 | ((i) & 8) >> 1)
#define ADD_HALVES(shuffle, a, b, first, second)                                                                                           \
    _mm512_add_ps(_mm512_shuffle_##shuffle(a, b, first), _mm512_shuffle_##shuffle(a, b, second))
VEC void vf_sums_of_rows(float *sums, float (*rows)[16], int count) {
    vf v[8];
    (void)count;
    for (int i = 0; i < 8; i++)
        v[i] = ADD_HALVES(f32x4, vf_load_f32(DEALT_ROW(i)), vf_load_f32(DEALT_ROW(i + 8)), 0x44, 0xee);
    for (int i = 0; i < 4; i++)
        v[i] = ADD_HALVES(f32x4, v[i], v[i + 4], 0x88, 0xdd);
    for (int i = 0; i < 2; i++)
        v[i] = ADD_HALVES(ps, v[i], v[i + 2], 0x44, 0xee);
    vf_store_f32(sums, ADD_HALVES(ps, v[0], v[1], 0x88, 0xdd));
}
#elif defined(FBN_AVX2)
#define FAR_ROW(i) (i)
#define ADD_HALVES(shuffle, a, b, first, second) _mm256_add_ps(_mm256_##shuffle(a, b, first), _mm256_##shuffle(a, b, second))
VEC void vf_sums_of_rows(float *sums, float (*rows)[16], int count) {
    for (int half = 0; half < count; half += 8) {
        vf v[8];
        for (int i = 0; i < 8; i++)
            v[i] = vf_add(vf_load_f32(DEALT_ROW(half + i)), vf_load_f32(DEALT_ROW(half + i) + 8));
        for (int i = 0; i < 4; i++)
            v[i] = ADD_HALVES(permute2f128_ps, v[i], v[i + 4], 0x20, 0x31);
        for (int i = 0; i < 2; i++)
            v[i] = ADD_HALVES(shuffle_ps, v[i], v[i + 2], 0x44, 0xee);
        vf_store_f32(sums + half, ADD_HALVES(shuffle_ps, v[0], v[1], 0x88, 0xdd));
    }
}
#endif

/* Operations that an ISA has no instruction for, made of its others. */
#if !defined(FBN_AVX2) && !defined(FBN_AVX512)
#if !defined(FBN_SSE2)
DO(vf_stream_f32, (float *p, vf a), vf_store_f32(p, a))
DO(vd_stream_f64, (double *p, vd a), vd_store_f64(p, a))
#endif
DO(vf_stream_f16, (uint16_t *p, vf a), vf_store_f16(p, a))
DO(vf_stream_bf16, (uint16_t *p, vf a), vf_store_bf16(p, a))
#endif

#define SUMS_OF_ROWS(V, E)                                                                                                                 \
    VEC void V##_sums_of_rows(E *sums, E(*rows)[16], int count) {                                                                          \
        for (int width = 8; width > 0; width /= 2)                                                                                         \
            for (int i = 0; i < count; i++)                                                                                                \
                for (int j = 0; j < width; j++)                                                                                            \
                    rows[i][j] += rows[i][j + width];                                                                                      \
        for (int i = 0; i < count; i++)                                                                                                    \
            sums[i] = rows[i][0];                                                                                                          \
    }
#if !defined(FBN_AVX2) && !defined(FBN_AVX512)
SUMS_OF_ROWS(vf, float)
#endif
SUMS_OF_ROWS(vd, double)

#if defined(FBN_SCALAR)
#define PART(V, LANES, T, storage)                                                                                                         \
    OP(V, V##_load_part_##storage, (const T *p, int64_t k), k > 0 ? V##_load_##storage(p) : 0)                                             \
    DO(V##_store_part_##storage, (T * p, V a, int64_t k), if (k > 0) V##_store_##storage(p, a))
#elif !defined(FBN_AVX512)
#define PART(V, LANES, T, storage)                                                                                                         \
    VEC V V##_load_part_##storage(const T *p, int64_t k) {                                                                                 \
        T lanes[LANES] = {0};                                                                                                              \
        if (k > 0)                                                                                                                         \
            memcpy(lanes, p, (size_t)(k < LANES ? k : LANES) * sizeof(T));                                                                 \
        return V##_load_##storage(lanes);                                                                                                  \
    }                                                                                                                                      \
    VEC void V##_store_part_##storage(T *p, V a, int64_t k) {                                                                              \
        T lanes[LANES];                                                                                                                    \
        V##_store_##storage(lanes, a);                                                                                                     \
        memcpy(p, lanes, (size_t)k * sizeof(T));                                                                                           \
    }
#endif
#if !defined(FBN_AVX2) && !defined(FBN_AVX512)
PART(vf, VF_LANES, float, f32)
PART(vd, VD_LANES, double, f64)
#endif
#if !defined(FBN_AVX512)
PART(vf, VF_LANES, uint16_t, f16)
PART(vf, VF_LANES, uint16_t, bf16)
#endif
