/* float16 and bfloat16 as storage: exact conversion to float64, and one rounding back, to nearest even. Nothing is rounded to float32 in
 * between, which would round twice, and a flush-to-zero mode of the process changes no bit. docs/numerics.md: 16-bit storage. Private to
 * src_c. */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint64_t bits_of_f64(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double f64_of_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A 16-bit float has `mant` mantissa bits; the others are its sign and an exponent of the given bias. */
static inline double half_to_f64(uint16_t half, int mant, int bias) {
    const uint64_t sign = (uint64_t)(half >> 15) << 63;
    const int exponent = (half & 0x7fff) >> mant;
    const uint64_t fraction = half & ((1u << mant) - 1);
    if (exponent == 0) { /* zero or subnormal: fraction * 2^(1 - bias - mant) */
        const double ulp = f64_of_bits((uint64_t)(1023 + 1 - bias - mant) << 52);
        return f64_of_bits(bits_of_f64((double)fraction * ulp) | sign);
    }
    if (exponent == 2 * bias + 1)
        return f64_of_bits(sign | 0x7ff0000000000000u | fraction << (52 - mant));
    return f64_of_bits(sign | (uint64_t)(exponent - bias + 1023) << 52 | fraction << (52 - mant));
}

static inline uint16_t f64_to_half(double value, int mant, int bias) {
    const uint64_t bits = bits_of_f64(value), magnitude = bits & 0x7fffffffffffffffu;
    const uint16_t sign = (uint16_t)(bits >> 48 & 0x8000), infinity = (uint16_t)((2 * bias + 1) << mant);
    const int exponent = (int)(magnitude >> 52) - 1023;
    if (magnitude > 0x7ff0000000000000u)
        return (uint16_t)(sign | infinity | 1u << (mant - 1));
    if (exponent > bias)
        return sign | infinity;
    if (exponent < 1 - bias) { /* subnormal: the last bit of a float64 of the shifter's magnitude is the last bit of the result */
        const double shifter = f64_of_bits((uint64_t)(1023 + 1 - bias - mant + 52) << 52);
        return (uint16_t)(sign | (bits_of_f64(f64_of_bits(magnitude) + shifter) & 0xffff));
    }
    const int drop = 52 - mant;
    const uint64_t even = magnitude >> drop & 1, rounded = magnitude + ((uint64_t)1 << (drop - 1)) - 1 + even;
    /* A carry out of the largest exponent makes exactly the pattern of infinity. */
    return (uint16_t)(sign | ((rounded >> drop) - ((uint64_t)(1023 - bias) << mant)));
}

static inline double f16_to_f64(uint16_t half) {
    return half_to_f64(half, 10, 15);
}
static inline uint16_t f64_to_f16(double value) {
    return f64_to_half(value, 10, 15);
}
static inline double bf16_to_f64(uint16_t half) {
    return half_to_f64(half, 7, 127);
}
static inline uint16_t f64_to_bf16(double value) {
    return f64_to_half(value, 7, 127);
}

#endif
