// Products of rows for convolutions of few channels: C[pixels × outputs] (+)= Σ over runs of A · B, and the sums over
// pixels of their weight's gradient. Panels of outputs are whole vectors and at most one half, so that 24 channels cost
// as much as 24 and not 32. Every tile keeps its sums in registers from the first product to the last. float32 and
// float64 are multiplied number by number, bfloat16 in pairs, whose two products are added to a sum in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "cpu/gemm.h"

namespace yolov9_fast::narrow {

using gemm::broadcast;
using gemm::kLanes;
using gemm::kTileVectors;
using gemm::kVectorBytes;
using gemm::load;
using gemm::multiply_add;
using gemm::store;
using gemm::Vector;

template <class T>
struct HalfOf;
template <>
struct HalfOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct HalfOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Half = typename HalfOf<T>::type;

inline Half<float> multiply_add(Half<float> a, Half<float> b, Half<float> c) {
#if defined(__AVX512F__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline Half<double> multiply_add(Half<double> a, Half<double> b, Half<double> c) {
#if defined(__AVX512F__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Two adjacent bfloat16: the element of which products of bfloat16 are made.
struct Pair {
  uint32_t bits;
};

template <class T>
struct ElementOf {
  using type = T;
  static constexpr int64_t numbers = 1;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
  static constexpr int64_t numbers = 2;
};
template <class T>
using Element = typename ElementOf<T>::type;

template <class E>
struct SumOf {
  using type = E;
};
template <>
struct SumOf<Pair> {
  using type = float;
};
template <class E>
using Sum = typename SumOf<E>::type;

template <class V>
struct BitsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(V))));
};
template <class V>
using Bits = typename BitsOf<V>::type;

// sum + a · b of one element of A and a vector of elements of B.
template <class E, class V>
[[gnu::always_inline]] inline V add_product(const E* a, const E* b, V sum) {
  V row;
  std::memcpy(&row, b, sizeof row);
  return multiply_add(*a - V{}, row, sum);
}
template <class V>
[[gnu::always_inline]] inline V add_product(const Pair* a, const Pair* b, V sum) {
  Bits<V> row;
  std::memcpy(&row, b, sizeof row);
  const Bits<V> element = a->bits - Bits<V>{};
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)element, (__m512bh)row);
  if constexpr (sizeof(V) == 32) return (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)element, (__m256bh)row);
#endif
  constexpr uint32_t upper = 0xffff0000u;
  sum = multiply_add((V)(element << 16), (V)(row << 16), sum);
  return multiply_add((V)(element & upper), (V)(row & upper), sum);
}

template <class T, class V>
[[gnu::always_inline]] inline V read(const T* from, V) {
  V values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
template <class V>
[[gnu::always_inline]] inline V read(const BFloat16* from, V) {
  typedef uint16_t Stored __attribute__((vector_size(sizeof(V) / 2)));
  Stored stored;
  std::memcpy(&stored, from, sizeof stored);
  return (V)(__builtin_convertvector(stored, Bits<V>) << 16);
}

template <class T, class V>
[[gnu::always_inline]] inline void write(T* to, V values) {
  std::memcpy(to, &values, sizeof values);
}
// Rounded to nearest even; a NaN keeps its upper half and becomes quiet.
template <class V>
[[gnu::always_inline]] inline void write(BFloat16* to, V values) {
  typedef uint16_t Stored __attribute__((vector_size(sizeof(V) / 2)));
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (sizeof(V) == 64) {
    const __m256bh stored = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(to, &stored, sizeof stored);
    return;
  }
#endif
  const Bits<V> bits = (Bits<V>)values;
  const Bits<V> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits<V> chosen = values == values ? rounded : bits | 0x400000;
  const Stored stored = __builtin_convertvector(chosen >> 16, Stored);
  std::memcpy(to, &stored, sizeof stored);
}

// The columns of the next panel of `left` outputs, a multiple of half a vector.
template <class S>
int64_t panel(int64_t left) {
  constexpr int64_t most = kTileVectors * kLanes<S>;
  return left < most ? left : most;
}

// Rows of a tile of `Whole` vectors and, with `Rest`, a half: sums, a row of B and one element of A fill the registers.
template <int Whole, bool Rest>
constexpr int kRows = kVectorBytes == 64 ? (Whole + Rest == 1   ? 14
                                            : Whole + Rest == 2 ? 12
                                            : Whole + Rest == 3 ? 8
                                                                : 6)
                                         : (Whole + Rest == 1   ? 10
                                            : Whole + Rest == 2 ? 5
                                                                : 4);

// The sums of a tile of products of elements E.
template <class E, int Whole, bool Rest, int Rows>
struct Sums {
  using S = Sum<E>;
  static constexpr int lanes = kLanes<S>;
  Vector<S> whole[Rows][Whole > 0 ? Whole : 1];
  Half<S> rest[Rows];

  template <class T>
  [[gnu::always_inline]] void start(const T* from, int64_t step) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v)
        whole[r][v] = from != nullptr ? read(from + r * step + v * lanes, Vector<S>{}) : Vector<S>{};
      rest[r] = Rest && from != nullptr ? read(from + r * step + Whole * lanes, Half<S>{}) : Half<S>{};
    }
  }

  // sum[r] += a[r · step] · b
  [[gnu::always_inline]] void add(const E* a, int64_t step, const E* b) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v) whole[r][v] = add_product(a + r * step, b + v * lanes, whole[r][v]);
      if (Rest) rest[r] = add_product(a + r * step, b + Whole * lanes, rest[r]);
    }
  }

  template <class T>
  [[gnu::always_inline]] void write(T* to, int64_t step) const {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v) narrow::write(to + r * step + v * lanes, whole[r][v]);
      if (Rest) narrow::write(to + r * step + Whole * lanes, rest[r]);
    }
  }
};

// Pixels of one line of a result: pixel p sums, over `lines` lines of the map, the products of `length` adjacent
// elements from p · `pixel` on with B.
template <class T>
struct Rows {
  using E = Element<T>;
  const E* a;
  int64_t pixel, line, lines, length;
  const E* b;  // [lines · length][columns]
  T* c;
  int64_t c_row;
  bool add;  // to what C holds

  template <int Whole, bool Rest, int Count>
  void tile(int64_t first) const {
    constexpr int columns = Whole * kLanes<Sum<E>> + (Rest ? kLanes<Sum<E>> / 2 : 0);
    Sums<E, Whole, Rest, Count> sums;
    T* to = c + first * c_row;
    sums.start(add ? to : nullptr, c_row);
    const E* weights = b;
    for (int64_t y = 0; y < lines; ++y) {
      const E* from = a + first * pixel + y * line;
      for (int64_t k = 0; k < length; ++k, weights += columns) sums.add(from + k, pixel, weights);
    }
    sums.write(to, c_row);
  }
};

// Pixels of some lines of a map and of a gradient: sums over all of them of A's element k from a pixel on, times B.
template <class E>
struct Pixels {
  const E* a;
  int64_t line, step;  // elements from a line to the next, from an element that is multiplied to the next
  const E* b;
  int64_t b_row, lines, steps;
  Sum<E>* c;  // [elements][columns], added to

  template <int Whole, bool Rest, int Count>
  void tile(int64_t first) const {
    constexpr int columns = Whole * kLanes<Sum<E>> + (Rest ? kLanes<Sum<E>> / 2 : 0);
    Sums<E, Whole, Rest, Count> sums;
    sums.start(static_cast<const Sum<E>*>(nullptr), 0);
    const E* gradient = b;
    for (int64_t y = 0; y < lines; ++y) {
      const E* from = a + first + y * line;
      for (int64_t x = 0; x < steps; ++x, from += step, gradient += b_row) sums.add(from, 1, gradient);
    }
    Sums<E, Whole, Rest, Count> all;
    all.start(c + first * columns, columns);
#pragma GCC unroll 14
    for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v) all.whole[r][v] += sums.whole[r][v];
      if (Rest) all.rest[r] += sums.rest[r];
    }
    all.write(c + first * columns, columns);
  }
};

template <class Task, int Whole, bool Rest, int Count>
void tile_of(const Task& task, int64_t first, int64_t count) {
  if (count == Count) return task.template tile<Whole, Rest, Count>(first);
  if constexpr (Count > 1) tile_of<Task, Whole, Rest, Count - 1>(task, first, count);
}

// Tiles of nearly equal heights over `count` rows.
template <class Task, int Whole, bool Rest>
void tiles(const Task& task, int64_t count) {
  constexpr int most = kRows<Whole, Rest>;
  const int64_t number = (count + most - 1) / most;
  for (int64_t t = 0; t < number; ++t) {
    const int64_t first = t * count / number;
    tile_of<Task, Whole, Rest, most>(task, first, (t + 1) * count / number - first);
  }
}

template <class S, class Task, int Whole = kTileVectors>
void tiles_of_columns(const Task& task, int64_t count, int64_t columns) {
  constexpr int lanes = kLanes<S>;
  if (columns == Whole * lanes) {
    if constexpr (Whole > 0) return tiles<Task, Whole, false>(task, count);
  } else if (Whole < kTileVectors && columns == Whole * lanes + lanes / 2) {
    if constexpr (Whole < kTileVectors) return tiles<Task, Whole, true>(task, count);
  } else if constexpr (Whole > 0) {
    tiles_of_columns<S, Task, Whole - 1>(task, count, columns);
  }
}

// `width` pixels by a panel of `columns`.
template <class T>
void multiply_rows(const Rows<T>& rows, int64_t width, int64_t columns) {
  tiles_of_columns<Sum<Element<T>>>(rows, width, columns);
}

// `count` elements of A by a panel of `columns`.
template <class E>
void add_products(const Pixels<E>& pixels, int64_t count, int64_t columns) {
  tiles_of_columns<Sum<E>>(pixels, count, columns);
}

}  // namespace yolov9_fast::narrow
