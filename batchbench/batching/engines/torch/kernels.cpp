// The operations of a decode step on a processor with AVX-512: the product of a few rows with a
// large matrix, norms, attention over the slot cache, and the greedy choice. kernels.py compiles
// this file and says what each function takes.
//
// A step reads every weight once, from memory, so the products ask for them well before they are
// needed: the processor's own prefetcher stops at the end of each page of 4 KiB. Numbers are
// bfloat16 or float32 in memory and float32 in registers.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include <initializer_list>
#include <vector>

namespace {

constexpr long LANES = 16;    // floats in a vector
constexpr long COLUMNS = 32;  // outputs whose weights lie together: a panel
constexpr long ROWS = 8;      // rows at once: ROWS x COLUMNS sums fill half of the registers

constexpr long SERIAL = 32768;     // numbers that one thread norms faster than several
constexpr long POSITIONS = 128;    // cached positions between two corrections of the softmax
constexpr long HEAD_VECTORS = 16;  // head sizes up to 256

constexpr long LINE = 64;             // bytes that come from memory together
constexpr long WEIGHTS_AHEAD = 4096;  // bytes from what is in use to what is asked for
constexpr long KEYS_AHEAD = 2048;

struct bfloat16 {
    uint16_t bits;
};

inline void ask_for(const void* p, long ahead) {
    _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T0);
}

inline __mmask16 first(long n) { return n >= LANES ? 0xffff : (1u << n) - 1; }

inline __m512 load(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }

inline __m512 load(const bfloat16* p, __mmask16 lanes) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float* p, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(p, lanes, x); }

// The upper half is the nearest bfloat16, the even one of two; NaN stays NaN.
inline __m512i round_up_half(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i round = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, bits, round);
}

inline void store(bfloat16* p, __mmask16 lanes, __m512 x) {
    __m512i halves = _mm512_srli_epi32(round_up_half(x), 16);
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(halves));
}

// What a tensor of this format would hold, for results that transformers keeps in one.
template <class T>
inline __m512 rounded(__m512 x) {
    if (sizeof(T) == sizeof(float)) return x;
    return _mm512_castsi512_ps(_mm512_and_si512(round_up_half(x), _mm512_set1_epi32(0xffff0000)));
}

// 2^(x log2 e): the power's whole part goes into the exponent, its rest through a polynomial
// (Taylor's, exact to float32 on +-ln(2)/2).
inline __m512 exponential(__m512 x) {
    // The second operand is what a NaN comes through.
    x = _mm512_min_ps(_mm512_set1_ps(89.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.f / 5040);
    const float rest[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    for (float c : rest)
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(sum, n);
}

inline __m512 silu(__m512 x) {
    __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(power, _mm512_set1_ps(1.f)));
}

// GPT-2's: x/2 (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
inline __m512 gelu(__m512 x) {
    __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    __m512 power = exponential(_mm512_mul_ps(u, _mm512_set1_ps(-1.59576912f)));
    return _mm512_div_ps(x, _mm512_add_ps(power, _mm512_set1_ps(1.f)));
}

// ---- products

enum Through { NOTHING, GELU, SWIGLU };

// With SWIGLU a panel has the weights of LANES outputs of the gate and those of the LANES outputs
// that they multiply; so has the bias, and `outputs` is the number of results.
template <class T>
struct Product {
    const T* weight;  // [panels, inputs, COLUMNS]; of bfloat16 [panels, inputs / 2, COLUMNS, 2]
    const T* bias;    // [outputs] or null
    const T* add;     // [rows, outputs] or null
    T* out;           // [rows, outputs]
    long rows, inputs, outputs, through;
};

// How a panel is multiplied with R rows of x, `inputs` apart. Each adds into sums[R][2].

struct Float32 {
    using Weight = float;
    using Input = float;
    template <int R>
    static inline void multiply(const float* x, const float* w, long inputs, __m512 (*sums)[2]) {
        for (long k = 0; k < inputs; k++, w += COLUMNS) {
            __m512 left = _mm512_loadu_ps(w), right = _mm512_loadu_ps(w + LANES);
            ask_for(w, WEIGHTS_AHEAD);
            ask_for(w + LANES, WEIGHTS_AHEAD);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512 a = _mm512_set1_ps(x[r * inputs + k]);
                sums[r][0] = _mm512_fmadd_ps(left, a, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(right, a, sums[r][1]);
            }
        }
    }
};

// bfloat16 weights, widened in registers: on Intel's processors without AMX their own product
// instruction computes no more a cycle than float32's, and on some much less.
struct Widened {
    using Weight = bfloat16;
    using Input = float;
    template <int R>
    static inline void multiply(const float* x, const bfloat16* w, long inputs, __m512 (*sums)[2]) {
        const __m512i upper = _mm512_set1_epi32(0xffff0000);
        for (long k = 0; k < inputs; k += 2, w += 2 * COLUMNS) {
            __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + COLUMNS);
            ask_for(w, WEIGHTS_AHEAD);
            ask_for(w + COLUMNS, WEIGHTS_AHEAD);
            __m512 left_0 = _mm512_castsi512_ps(_mm512_slli_epi32(left, 16));
            __m512 right_0 = _mm512_castsi512_ps(_mm512_slli_epi32(right, 16));
            __m512 left_1 = _mm512_castsi512_ps(_mm512_and_si512(left, upper));
            __m512 right_1 = _mm512_castsi512_ps(_mm512_and_si512(right, upper));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512 a = _mm512_set1_ps(x[r * inputs + k]);
                sums[r][0] = _mm512_fmadd_ps(left_0, a, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(right_0, a, sums[r][1]);
                __m512 b = _mm512_set1_ps(x[r * inputs + k + 1]);
                sums[r][0] = _mm512_fmadd_ps(left_1, b, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(right_1, b, sums[r][1]);
            }
        }
    }
};

// bfloat16 by its own instruction, twice as fast as float32 where the processor has it in full.
struct Dotted {
    using Weight = bfloat16;
    using Input = bfloat16;
    template <int R>
    static inline void multiply(
        const bfloat16* x, const bfloat16* w, long inputs, __m512 (*sums)[2]) {
        for (long k = 0; k < inputs; k += 2, w += 2 * COLUMNS) {
            __m512bh left = (__m512bh)_mm512_loadu_si512(w);
            __m512bh right = (__m512bh)_mm512_loadu_si512(w + COLUMNS);
            ask_for(w, WEIGHTS_AHEAD);
            ask_for(w + COLUMNS, WEIGHTS_AHEAD);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int pair;
                __builtin_memcpy(&pair, x + r * inputs + k, sizeof pair);
                __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, a);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, a);
            }
        }
    }
};

template <class Way, int R>
void tile(
    const Product<typename Way::Weight>& p, const typename Way::Input* x, long row, long panel) {
    __m512 sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const long inputs = p.inputs;
    Way::template multiply<R>(x + row * inputs, p.weight + panel * inputs * COLUMNS, inputs, sums);
    if (p.through == SWIGLU) {
        __mmask16 lanes = first(p.outputs - panel * LANES);
        __m512 none = _mm512_setzero_ps();
        __m512 left = p.bias ? load(p.bias + panel * COLUMNS, 0xffff) : none;
        __m512 right = p.bias ? load(p.bias + panel * COLUMNS + LANES, 0xffff) : none;
        for (int r = 0; r < R; r++) {
            __m512 gate = silu(_mm512_add_ps(sums[r][0], left));
            __m512 y = _mm512_mul_ps(gate, _mm512_add_ps(sums[r][1], right));
            store(p.out + (row + r) * p.outputs + panel * LANES, lanes, y);
        }
        return;
    }
    for (int half = 0; half < 2; half++) {
        long column = panel * COLUMNS + half * LANES;
        if (column >= p.outputs) break;
        __mmask16 lanes = first(p.outputs - column);
        __m512 bias = p.bias ? load(p.bias + column, lanes) : _mm512_setzero_ps();
        for (int r = 0; r < R; r++) {
            long at = (row + r) * p.outputs + column;
            __m512 y = _mm512_add_ps(sums[r][half], bias);
            if (p.through == GELU) y = gelu(y);
            if (p.add) y = _mm512_add_ps(y, load(p.add + at, lanes));
            store(p.out + at, lanes, y);
        }
    }
}

// The rows are the inner loop: a panel comes from memory for the first of them and from the cache
// for the rest. Each thread has a run of panels that lie end to end.
template <class Way>
void multiply(const Product<typename Way::Weight>& p, const typename Way::Input* x) {
    const long width = p.through == SWIGLU ? LANES : COLUMNS;
    const long panels = (p.outputs + width - 1) / width;
#pragma omp for schedule(static)
    for (long panel = 0; panel < panels; panel++) {
        long row = 0;
        for (; row + ROWS <= p.rows; row += ROWS) tile<Way, ROWS>(p, x, row, panel);
        switch (p.rows - row) {
            case 1: tile<Way, 1>(p, x, row, panel); break;
            case 2: tile<Way, 2>(p, x, row, panel); break;
            case 3: tile<Way, 3>(p, x, row, panel); break;
            case 4: tile<Way, 4>(p, x, row, panel); break;
            case 5: tile<Way, 5>(p, x, row, panel); break;
            case 6: tile<Way, 6>(p, x, row, panel); break;
            case 7: tile<Way, 7>(p, x, row, panel); break;
        }
    }
}

void product(const Product<float>& p, const float* x, float*) {
#pragma omp parallel
    multiply<Float32>(p, x);
}

// `widened`, [rows, inputs], is room for x in float32; null to use the processor's own bfloat16.
void product(const Product<bfloat16>& p, const bfloat16* x, float* widened) {
#pragma omp parallel
    if (widened) {
#pragma omp for schedule(static)
        for (long i = 0; i < (p.rows * p.inputs + LANES - 1) / LANES; i++) {
            __mmask16 lanes = first(p.rows * p.inputs - i * LANES);
            store(widened + i * LANES, lanes, load(x + i * LANES, lanes));
        }
        multiply<Widened>(p, widened);
    } else {
        multiply<Dotted>(p, x);
    }
}

// ---- norms and rotary positions

// x / sqrt(mean(x^2) + eps) * weight; with a bias of (x - mean), and plus it. `out` may be `x`.
template <class T>
void norm(const T* x, const T* weight, const T* bias, T* out, long size, float eps) {
    __m512 sums = _mm512_setzero_ps(), squares = sums, mean = sums;
    for (long i = 0; bias && i < size; i += LANES)
        sums = _mm512_add_ps(sums, load(x + i, first(size - i)));
    if (bias) mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums) / size);
    for (long i = 0; i < size; i += LANES) {
        __mmask16 lanes = first(size - i);
        __m512 part = _mm512_maskz_sub_ps(lanes, load(x + i, lanes), mean);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    const __m512 factor = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
    for (long i = 0; i < size; i += LANES) {
        __mmask16 lanes = first(size - i);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(x + i, lanes), mean), factor);
        __m512 scale = load(weight + i, lanes);
        y = bias ? _mm512_fmadd_ps(y, scale, load(bias + i, lanes))
                 : _mm512_mul_ps(rounded<T>(y), scale);
        store(out + i, lanes, y);
    }
}

template <class T>
void norms(
    const T* x, const T* weight, const T* bias, T* out, long rows, long size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > SERIAL)
    for (long r = 0; r < rows; r++) norm(x + r * size, weight, bias, out + r * size, size, eps);
}

// Rotates each number of a head with the one half a head away.
template <class T>
void rotate(T* x, const T* cosines, const T* sines, long half) {
    for (long i = 0; i < half; i += LANES) {
        __mmask16 lanes = first(half - i);
        __m512 left = load(x + i, lanes), right = load(x + half + i, lanes);
        __m512 cosine = load(cosines + i, lanes), sine = load(sines + i, lanes);
        auto times = [](__m512 a, __m512 b) { return rounded<T>(_mm512_mul_ps(a, b)); };
        store(x + i, lanes, _mm512_sub_ps(times(left, cosine), times(right, sine)));
        store(x + half + i, lanes, _mm512_add_ps(times(right, cosine), times(left, sine)));
    }
}

// ---- attention

// G queries over the first `length` cached positions of their slot and head, [length, size] each of
// keys and values: a softmax that is corrected every POSITIONS (Milakov and Gimelshein 2018). Where
// SIZE is known it is `size`, and a head stays in registers.
template <class T, long SIZE, int G>
void attend(
    const T* q, const T* keys, const T* values, long length, long some_size, float scale, T* out) {
    constexpr long MOST = SIZE ? SIZE / LANES : HEAD_VECTORS;
    const long size = SIZE ? SIZE : some_size;
    const long vectors = SIZE ? MOST : (size + LANES - 1) / LANES;
    auto lanes = [size](long v) { return SIZE ? first(LANES) : first(size - v * LANES); };
    __m512 query[G][MOST], sums[G][MOST];
    float scores[G][POSITIONS], highest[G], total[G];
    for (int g = 0; g < G; g++) {
        highest[g] = -INFINITY, total[g] = 0;
        for (long v = 0; v < vectors; v++) {
            __m512 part = load(q + g * size + v * LANES, lanes(v));
            query[g][v] = _mm512_mul_ps(part, _mm512_set1_ps(scale));
            sums[g][v] = _mm512_setzero_ps();
        }
    }
    for (long from = 0; from < length; from += POSITIONS) {
        const long n = length - from < POSITIONS ? length - from : POSITIONS;
        float top[G];
        for (int g = 0; g < G; g++) top[g] = highest[g];
        for (long i = 0; i < n; i++) {
            const T* key = keys + (from + i) * size;
            for (long v = 0; v < vectors; v += LINE / (LANES * sizeof(T))) {
                ask_for(key + v * LANES, KEYS_AHEAD);
                ask_for(values + (from + i) * size + v * LANES, 0);  // wanted next
            }
            __m512 sum[G], part = load(key, lanes(0));
            for (int g = 0; g < G; g++) sum[g] = _mm512_mul_ps(query[g][0], part);
            for (long v = 1; v < vectors; v++) {
                part = load(key + v * LANES, lanes(v));
                for (int g = 0; g < G; g++) sum[g] = _mm512_fmadd_ps(query[g][v], part, sum[g]);
            }
            for (int g = 0; g < G; g++) {
                scores[g][i] = _mm512_reduce_add_ps(sum[g]);
                top[g] = scores[g][i] > top[g] ? scores[g][i] : top[g];
            }
        }
        for (int g = 0; g < G; g++) {
            const float shrink = expf(highest[g] - top[g]);
            __m512 added = _mm512_setzero_ps();
            for (long i = 0; i < n; i += LANES) {
                __mmask16 there = first(n - i);
                __m512 below = _mm512_sub_ps(load(scores[g] + i, there), _mm512_set1_ps(top[g]));
                __m512 weight = _mm512_maskz_mov_ps(there, exponential(below));
                store(scores[g] + i, there, weight);
                added = _mm512_add_ps(added, weight);
            }
            total[g] = total[g] * shrink + _mm512_reduce_add_ps(added);
            for (long v = 0; v < vectors; v++)
                sums[g][v] = _mm512_mul_ps(sums[g][v], _mm512_set1_ps(shrink));
            highest[g] = top[g];
        }
        for (long i = 0; i < n; i++) {
            const T* value = values + (from + i) * size;
            for (long v = 0; v < vectors; v++) {
                __m512 part = load(value + v * LANES, lanes(v));
                for (int g = 0; g < G; g++)
                    sums[g][v] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g][i]), part, sums[g][v]);
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (long v = 0; v < vectors; v++)
            store(out + g * size + v * LANES, lanes(v),
                  _mm512_div_ps(sums[g][v], _mm512_set1_ps(total[g])));
}

// `group` queries that share keys and values, G at once while there are as many.
template <class T, long SIZE, int G>
void attend_group(
    const T* q, const T* keys, const T* values, long length, long size, float scale, T* out,
    long group) {
    for (; group >= G; group -= G, q += G * size, out += G * size)
        attend<T, SIZE, G>(q, keys, values, length, size, scale, out);
    if constexpr (G > 1)
        if (group) attend_group<T, SIZE, G - 1>(q, keys, values, length, size, scale, out, group);
}

template <class T>
struct Attention {
    T* qkv;           // [tokens, heads + 2 kv_heads, size]; queries and keys change in place
    T* block;         // [2, all_slots, kv_heads, max_len, size]
    const int64_t *slots, *positions;  // [tokens]
    const T* angles;  // [2, tokens, size / 2], cosines and sines, or null
    const T *q_norm, *k_norm;          // [size] or null
    T* out;           // [tokens, heads, size]
    long tokens, decoding, heads, kv_heads, size, all_slots, max_len;
    float scale, eps;
};

// One pass over a layer: each token's keys and values go to their slot and position, then each of
// the first `decoding` tokens attends to its slot up to itself. A slot that decodes gets no other
// token in the same pass, so nobody waits for anybody.
template <class T>
void attention(const Attention<T>& a) {
    const long size = a.size, group = a.heads / a.kv_heads;
    const long values = a.all_slots * a.kv_heads * a.max_len * size;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < a.kv_heads * a.tokens; i++) {
        const long head = i / a.tokens, token = i % a.tokens;
        T* row = a.qkv + token * (a.heads + 2 * a.kv_heads) * size;
        T *q = row + head * group * size, *key = row + (a.heads + head) * size;
        const T* cosines = a.angles + token * (size / 2);
        for (long h = 0; h <= group; h++) {
            T* x = h < group ? q + h * size : key;
            if (a.q_norm) norm(x, h < group ? a.q_norm : a.k_norm, (const T*)nullptr, x, size, a.eps);
            if (a.angles) rotate(x, cosines, cosines + a.tokens * (size / 2), size / 2);
        }
        T* keys = a.block + (a.slots[token] * a.kv_heads + head) * a.max_len * size;
        const long length = a.positions[token] + 1;
        T* at = keys + (length - 1) * size;
        __builtin_memcpy(at, key, size * sizeof(T));
        __builtin_memcpy(at + values, key + a.kv_heads * size, size * sizeof(T));
        if (token < a.decoding) {
            auto some = attend_group<T, 0, 1>;
            if (size == 64) some = attend_group<T, 64, 4>;
            if (size == 128) some = attend_group<T, 128, 2>;
            T* out = a.out + (token * a.heads + head * group) * size;
            some(q, keys, keys + values, length, size, a.scale, out, group);
        }
    }
}

// ---- all layers, for a pass that only decodes

template <class T>
struct Layer {
    const T *norm_1, *norm_1_bias, *qkv, *qkv_bias, *q_norm, *k_norm, *attention_out, *out_bias;
    const T *norm_2, *norm_2_bias, *mlp_in, *in_bias, *mlp_out, *mlp_bias;
    T* block;
};

struct Sizes {
    long layers, rows, width, inner, through, heads, kv_heads, size, all_slots, max_len;
    float scale, eps;
};

// `x`, [rows, width], changes in place; `room` is for the results between products of a layer.
template <class T>
void decode(
    const Layer<T>* layers, T* x, T* room, float* widened, const int64_t* slots,
    const int64_t* positions, const T* angles, const Sizes& s) {
    const long rows = s.rows, seen = s.heads * s.size, all = seen + 2 * s.kv_heads * s.size;
    T *normed = room, *qkv = normed + rows * s.width, *out = qkv + rows * all;
    T* inner = out + rows * seen;
    for (const Layer<T>* l = layers; l < layers + s.layers; l++) {
        norms(x, l->norm_1, l->norm_1_bias, normed, rows, s.width, s.eps);
        product({l->qkv, l->qkv_bias, nullptr, qkv, rows, s.width, all, NOTHING}, normed, widened);
        attention<T>({qkv, l->block, slots, positions, angles, l->q_norm, l->k_norm, out, rows, rows,
                      s.heads, s.kv_heads, s.size, s.all_slots, s.max_len, s.scale, s.eps});
        product({l->attention_out, l->out_bias, x, x, rows, seen, s.width, NOTHING}, out, widened);
        norms(x, l->norm_2, l->norm_2_bias, normed, rows, s.width, s.eps);
        product({l->mlp_in, l->in_bias, nullptr, inner, rows, s.width, s.inner, s.through}, normed,
                widened);
        product({l->mlp_out, l->mlp_bias, x, x, rows, s.inner, s.width, NOTHING}, inner, widened);
    }
}

// ---- the greedy choice

// The first of the largest numbers, NaN being larger than any, as torch has it.
template <class T>
int64_t largest(const T* row, long n) {
    const __m512i step = _mm512_set1_epi32(LANES);
    __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i place = at;
    __m512 best = _mm512_set1_ps(-INFINITY);
    for (long i = 0; i < n; i += LANES, at = _mm512_add_epi32(at, step)) {
        __mmask16 lanes = first(n - i);
        __m512 x = load(row + i, lanes);
        if (__mmask16 none = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)) return i + __builtin_ctz(none);
        __mmask16 larger = _mm512_mask_cmp_ps_mask(lanes, x, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, larger, x);
        place = _mm512_mask_mov_epi32(place, larger, at);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(best));
    const __mmask16 equal = _mm512_cmp_ps_mask(best, top, _CMP_EQ_OQ);
    return _mm512_mask_reduce_min_epi32(equal, place);
}

template <class T>
void greedy(const T* logits, int64_t* out, long rows, long vocabulary) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) out[r] = largest(logits + r * vocabulary, vocabulary);
}

// ---- sampling (sampling.py has the same noise in torch's operations, and says what is drawn)

// Bits of floats as integers that have the order of the floats.
inline int32_t ordered(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float unordered(int32_t key) {
    float x;
    key ^= (key >> 31) & 0x7fffffff;
    __builtin_memcpy(&x, &key, sizeof x);
    return x;
}

// The cuts of one row: `weights` counts tokens, or adds exp((x - top) / temperature).
struct Cut {
    float* x;  // the candidates
    long n;
    float top, per;  // the largest logit, and 1 / temperature

    template <bool COUNTS>
    float above(float bound) const {
        __m512 sum = _mm512_setzero_ps();
        const __m512 one = _mm512_set1_ps(1.f);
        for (long i = 0; i < n; i += LANES) {
            __m512 value = load(x + i, first(n - i));
            __mmask16 larger = _mm512_mask_cmp_ps_mask(
                first(n - i), value, _mm512_set1_ps(bound), _CMP_GT_OQ);
            __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_set1_ps(top)),
                                          _mm512_set1_ps(per));
            if (larger) sum = _mm512_mask_add_ps(sum, larger, sum, COUNTS ? one : exponential(scaled));
        }
        return _mm512_reduce_add_ps(sum);
    }

    void keep(float low, float high) {  // those above low and up to high
        long left = 0;
        for (long i = 0; i < n; i += LANES) {
            __m512 value = load(x + i, first(n - i));
            __mmask16 in = _mm512_mask_cmp_ps_mask(
                first(n - i), value, _mm512_set1_ps(low), _CMP_GT_OQ);
            in = _mm512_mask_cmp_ps_mask(in, value, _mm512_set1_ps(high), _CMP_LE_OQ);
            // Not mask_compressstoreu, which takes 100 cycles on Zen 4; what it writes too much was
            // read already.
            _mm512_storeu_ps(x + left, _mm512_maskz_compress_ps(in, value));
            left += __builtin_popcount(in);
        }
        n = left;
    }

    // The smallest logit above which less than `target` lies. Bisects, and forgets what is decided.
    template <bool COUNTS>
    float smallest(float target) {
        __m512 least = _mm512_set1_ps(top);
        for (long i = 0; i < n; i += LANES)
            least = _mm512_mask_min_ps(least, first(n - i), load(x + i, first(n - i)), least);
        int64_t low = ordered(_mm512_reduce_min_ps(least)), high = ordered(top);
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            const float bound = unordered(middle), sum = above<COUNTS>(bound);
            if (sum < target) {
                target -= sum;
                keep(-INFINITY, bound);
                high = middle;
            } else {
                keep(bound, INFINITY);
                low = middle + 1;
            }
        }
        return unordered(high);
    }
};

struct Sampling {
    long top_k;
    float temperature, top_p;
};

template <class T>
float smallest_kept(const T* row, long n, float top, const Sampling& how) {
    thread_local std::vector<float> room;
    room.resize(n + LANES);
    auto candidates = [&](float least) {
        for (long i = 0; i < n; i += LANES)
            store(room.data() + i, first(n - i), load(row + i, first(n - i)));
        Cut cut{room.data(), n, top, 1 / how.temperature};
        if (least > -INFINITY) cut.keep(unordered(ordered(least) - 1), INFINITY);
        return cut;
    };
    float least = -INFINITY;
    if (how.top_k > 0 && how.top_k < n) least = candidates(least).template smallest<true>(how.top_k);
    if (how.top_p < 1) {
        Cut cut = candidates(least);
        least = cut.template smallest<false>(how.top_p * cut.template above<false>(-INFINITY));
    }
    return least;
}

inline __m512i mixed(__m512i x, int shift, uint32_t factor) {
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, shift));
    return _mm512_mullo_epi32(x, _mm512_set1_epi32(factor));
}

// Natural logarithm of the whole part's power of two, and of 1 + f by atanh's series.
inline __m512 logarithm(__m512 power, __m512 f) {
    __m512 s = _mm512_div_ps(f, _mm512_add_ps(f, _mm512_set1_ps(2.f)));
    __m512 square = _mm512_mul_ps(s, s), sum = _mm512_set1_ps(2.f / 11);
    for (float c : {2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2.f})
        sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(c));
    return _mm512_fmadd_ps(power, _mm512_set1_ps(0.69314718f), _mm512_mul_ps(s, sum));
}

struct Parts {
    __m512 power, f;  // x = 2^power (1 + f), f from -1/4 to 1/2
};

inline Parts parts(__m512 x) {
    __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    __m512 power = _mm512_getexp_ps(x), one = _mm512_set1_ps(1.f);
    __mmask16 halved = _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ);
    return {_mm512_mask_add_ps(power, halved, power, one), _mm512_sub_ps(m, one)};
}

inline __m512 gumbel(__m512 uniform) {
    Parts rest = parts(_mm512_sub_ps(_mm512_set1_ps(1.f), uniform));
    __mmask16 near = _mm512_cmp_ps_mask(rest.power, _mm512_setzero_ps(), _CMP_EQ_OQ);
    // Where 1 - uniform is near 1, it has lost what matters.
    __m512 f = _mm512_mask_sub_ps(rest.f, near, _mm512_setzero_ps(), uniform);
    Parts waiting = parts(_mm512_sub_ps(_mm512_setzero_ps(), logarithm(rest.power, f)));
    return _mm512_sub_ps(_mm512_setzero_ps(), logarithm(waiting.power, waiting.f));
}

// Uniform numbers of the tokens from `token` on, for the keys of a row.
inline __m512 uniforms(long token, const int32_t* keys) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i x = _mm512_add_epi32(lanes, _mm512_set1_epi32(token));
    x = mixed(_mm512_xor_si512(x, _mm512_set1_epi32(keys[0])), 17, 0xed5ad4bb);
    x = mixed(_mm512_add_epi32(x, _mm512_set1_epi32(keys[1])), 11, 0xac4c1b51);
    x = mixed(x, 15, 0x31848bab);
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 14));
    __m512 half = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 1));
    half = _mm512_fmadd_ps(half, _mm512_set1_ps(0x1p-31f), _mm512_set1_ps(0x1p-32f));
    return _mm512_min_ps(half, _mm512_set1_ps(1 - 0x1p-24f));
}

constexpr float MOST_NOISE = 22.2f;

template <class T>
int64_t drawn(const T* row, const int32_t* keys, long n, const Sampling& how) {
    int64_t best = largest(row, n);
    const float top = _mm512_cvtss_f32(load(row + best, 1));
    const float least = smallest_kept(row, n, top, how), per = 1 / how.temperature;
    const __m512 temperature = _mm512_set1_ps(how.temperature);
    float most = -INFINITY;
    auto look = [&](long i, __mmask16 lanes) {
        __m512 x = load(row + i, lanes);
        lanes = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(least), _CMP_GE_OQ);
        // What cannot win needs no noise: neither with the most noise, nor with -log(uniform),
        // which is more than its own.
        __m512 most_now = _mm512_set1_ps(most - MOST_NOISE * how.temperature);
        lanes = _mm512_mask_cmp_ps_mask(lanes, x, most_now, _CMP_GT_OQ);
        if (!lanes) return;
        __m512 uniform = uniforms(i, keys);
        __m512 behind = _mm512_sub_ps(x, _mm512_set1_ps(most));
        __m512 needed = exponential(_mm512_mul_ps(behind, _mm512_set1_ps(per * 0.999f)));
        lanes = _mm512_mask_cmp_ps_mask(lanes, uniform, needed, _CMP_LE_OQ);
        if (!lanes) return;
        __m512 sum = _mm512_fmadd_ps(temperature, gumbel(uniform), x);
        float high = _mm512_mask_reduce_max_ps(lanes, sum);
        if (high <= most) return;
        most = high;
        best = i + __builtin_ctz(_mm512_mask_cmp_ps_mask(
            lanes, sum, _mm512_set1_ps(high), _CMP_EQ_OQ));
    };
    look(best, 1);
    for (long i = 0; i < n; i += LANES) look(i, first(n - i));
    return best;
}

template <class T>
void sample(
    const T* logits, const int32_t* keys, int64_t* out, long rows, long vocabulary, long top_k,
    float temperature, float top_p) {
    const Sampling how{top_k, temperature, top_p};
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++)
        out[r] = drawn(logits + r * vocabulary, keys + 2 * r, vocabulary, how);
}

}  // namespace

extern "C" {

#define BOTH_FORMATS(T)                                                                            \
    void product_##T(                                                                              \
        const T* x, const T* weight, const T* bias, const T* add, T* out, float* widened,          \
        long rows, long inputs, long outputs, long through) {                                      \
        product({weight, bias, add, out, rows, inputs, outputs, through}, x, widened);             \
    }                                                                                              \
    void attention_##T(                                                                            \
        T* qkv, T* block, const int64_t* slots, const int64_t* positions, const T* angles,         \
        const T* q_norm, const T* k_norm, T* out, long tokens, long decoding, long heads,          \
        long kv_heads, long size, long all_slots, long max_len, float scale, float eps) {          \
        attention<T>({qkv, block, slots, positions, angles, q_norm, k_norm, out, tokens, decoding, \
                      heads, kv_heads, size, all_slots, max_len, scale, eps});                     \
    }                                                                                              \
    void decode_##T(                                                                               \
        const Layer<T>* layers, T* x, T* room, float* widened, const int64_t* slots,               \
        const int64_t* positions, const T* angles, long count, long rows, long width, long inner,  \
        long through, long heads, long kv_heads, long size, long all_slots, long max_len,          \
        float scale, float eps) {                                                                  \
        decode(layers, x, room, widened, slots, positions, angles,                                 \
               {count, rows, width, inner, through, heads, kv_heads, size, all_slots, max_len,     \
                scale, eps});                                                                      \
    }                                                                                              \
    void greedy_##T(const T* logits, int64_t* out, long rows, long vocabulary) {                   \
        greedy(logits, out, rows, vocabulary);                                                     \
    }

using float32 = float;
BOTH_FORMATS(float32)
BOTH_FORMATS(bfloat16)

void sample_float32(
    const float* logits, const int32_t* keys, int64_t* out, long rows, long vocabulary, long top_k,
    float temperature, float top_p) {
    sample(logits, keys, out, rows, vocabulary, top_k, temperature, top_p);
}

void sample_bfloat16(
    const bfloat16* logits, const int32_t* keys, int64_t* out, long rows, long vocabulary,
    long top_k, float temperature, float top_p) {
    sample(logits, keys, out, rows, vocabulary, top_k, temperature, top_p);
}

}  // extern "C"
