// Products of rows for convolutions of few channels: C[pixels × outputs] (+)= Σ over runs of A · B, and the sums over
// pixels of their weight's gradient. Panels of outputs are whole vectors and at most one half, so that 24 channels cost
// as much as 24 and not 32. Every tile keeps its sums in registers from the first product to the last.
#pragma once

#include <cstdint>
#include <cstring>

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

// The columns of the next panel of `left` outputs, a multiple of half a vector.
template <class T>
int64_t panel(int64_t left) {
  constexpr int64_t most = kTileVectors * kLanes<T>;
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

// The sums of a tile.
template <class T, int Whole, bool Rest, int Rows>
struct Sums {
  static constexpr int lanes = kLanes<T>;
  Vector<T> whole[Rows][Whole > 0 ? Whole : 1];
  Half<T> rest[Rows];

  [[gnu::always_inline]] void start(const T* from, int64_t step) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v)
        whole[r][v] = from != nullptr ? load(from + r * step + v * lanes) : Vector<T>{};
      rest[r] = Half<T>{};
      if (Rest && from != nullptr) std::memcpy(&rest[r], from + r * step + Whole * lanes, sizeof rest[r]);
    }
  }

  // sum[r] += a[r · step] · b
  [[gnu::always_inline]] void add(const T* a, int64_t step, const T* b) {
    Vector<T> row[Whole > 0 ? Whole : 1];
    Half<T> last{};
#pragma GCC unroll 4
    for (int v = 0; v < Whole; ++v) row[v] = load(b + v * lanes);
    if (Rest) std::memcpy(&last, b + Whole * lanes, sizeof last);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const T element = a[r * step];
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v) whole[r][v] = multiply_add(broadcast(element), row[v], whole[r][v]);
      if (Rest) rest[r] = multiply_add(element - Half<T>{}, last, rest[r]);
    }
  }

  [[gnu::always_inline]] void write(T* to, int64_t step) const {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Whole; ++v) store(to + r * step + v * lanes, whole[r][v]);
      if (Rest) std::memcpy(to + r * step + Whole * lanes, &rest[r], sizeof rest[r]);
    }
  }
};

// Pixels of one line of a result: pixel p sums, over `lines` lines of the map, the products of `length` adjacent numbers
// from p · `channels` on with B.
template <class T>
struct Rows {
  const T* a;
  int64_t channels, line, lines, length;
  const T* b;  // [lines · length][columns]
  T* c;
  int64_t c_row;
  bool add;  // to what C holds

  template <int Whole, bool Rest, int Count>
  void tile(int64_t first) const {
    constexpr int columns = Whole * kLanes<T> + (Rest ? kLanes<T> / 2 : 0);
    Sums<T, Whole, Rest, Count> sums;
    T* to = c + first * c_row;
    sums.start(add ? to : nullptr, c_row);
    const T* weights = b;
    for (int64_t y = 0; y < lines; ++y) {
      const T* from = a + first * channels + y * line;
      for (int64_t k = 0; k < length; ++k, weights += columns) sums.add(from + k, channels, weights);
    }
    sums.write(to, c_row);
  }
};

// Pixels of some lines of a map and of a gradient: sums over all of them of A's number k from a pixel on, times B.
template <class T>
struct Pixels {
  const T* a;
  int64_t line, channels;
  const T* b;
  int64_t b_row, lines, width;
  T* c;  // [numbers][columns], added to

  template <int Whole, bool Rest, int Count>
  void tile(int64_t first) const {
    constexpr int columns = Whole * kLanes<T> + (Rest ? kLanes<T> / 2 : 0);
    Sums<T, Whole, Rest, Count> sums;
    sums.start(nullptr, 0);
    const T* gradient = b;
    for (int64_t y = 0; y < lines; ++y) {
      const T* from = a + first + y * line;
      for (int64_t x = 0; x < width; ++x, from += channels, gradient += b_row) sums.add(from, 1, gradient);
    }
    Sums<T, Whole, Rest, Count> all;
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

template <class T, class Task, int Whole = kTileVectors>
void tiles_of_columns(const Task& task, int64_t count, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  if (columns == Whole * lanes) {
    if constexpr (Whole > 0) return tiles<Task, Whole, false>(task, count);
  } else if (Whole < kTileVectors && columns == Whole * lanes + lanes / 2) {
    if constexpr (Whole < kTileVectors) return tiles<Task, Whole, true>(task, count);
  } else if constexpr (Whole > 0) {
    tiles_of_columns<T, Task, Whole - 1>(task, count, columns);
  }
}

// `width` pixels by a panel of `columns`.
template <class T>
void multiply_rows(const Rows<T>& rows, int64_t width, int64_t columns) {
  tiles_of_columns<T>(rows, width, columns);
}

// `count` numbers of A by a panel of `columns`.
template <class T>
void add_products(const Pixels<T>& pixels, int64_t count, int64_t columns) {
  tiles_of_columns<T>(pixels, count, columns);
}

}  // namespace yolov9_fast::narrow
