// The matrix product of the 1×1 convolution: one register tile, C[R × columns] (+)= A[R × L] · B[L × columns], written
// with vector types of the compiler. A is read element by element (any strides), B in full vectors (rows of any
// distance).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace yolov9_fast::gemm {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 2;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
// Columns of the widest tile: panels of packed operands are that wide.
template <class T>
constexpr int kPanel = kTileVectors * kLanes<T>;

// Rows of a tile: accumulators, one row of B and one element of A fill the registers (32 with AVX-512, else 16).
template <int Vectors>
constexpr int kTileRows = Vectors == 4         ? 6
                          : kVectorBytes == 64 ? 12
                          : Vectors == 2       ? 6
                                               : 12;

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline void store(T* to, Vector<T> value) {
  std::memcpy(to, &value, sizeof value);
}
template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// The compiler may not contract a·b + c (assign and nms need that); here the fused form is an explicit call.
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
struct Product {
  int64_t length;  // L
  const T* a;
  int64_t a_row, a_step;  // elements from a row of A to the next, from a column to the next
  const T* b;
  int64_t b_step;  // elements from a row of B to the next
  T* c;
  int64_t c_row;                    // elements from a row of C to the next
  const T* row_start = nullptr;     // what the sum of each row starts with (a bias per row), else
  const T* column_start = nullptr;  // what that of each column starts with, else
  bool accumulate = false;          // what C holds, else zero
};

template <class T, int Vectors, int Rows>
void tile(const Product<T>& p, int64_t columns) {
  constexpr int lanes = kLanes<T>, width = Vectors * lanes;
  Vector<T> sum[Rows][Vectors];
  const bool whole = columns >= width;
  T edge[width];
  for (int r = 0; r < Rows; ++r) {
    const T* start = p.column_start;
    if (p.accumulate) {
      start = p.c + r * p.c_row;
    }
    if (start != nullptr && !whole) {
      std::memset(edge, 0, sizeof edge);
      std::memcpy(edge, start, columns * sizeof(T));
      start = edge;
    }
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = start != nullptr         ? load(start + v * lanes)
                  : p.row_start != nullptr ? broadcast(p.row_start[r])
                                           : Vector<T>{};
  }
  const T* a = p.a;
  const T* b = p.b;
  for (int64_t l = 0; l < p.length; ++l) {
    Vector<T> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> element = broadcast(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add(element, row[v], sum[r][v]);
    }
    a += p.a_step;
    b += p.b_step;
  }
  for (int r = 0; r < Rows; ++r) {
    T* to = p.c + r * p.c_row;
    if (whole) {
      for (int v = 0; v < Vectors; ++v) store(to + v * lanes, sum[r][v]);
    } else {
      for (int v = 0; v < Vectors; ++v) store(edge + v * lanes, sum[r][v]);
      std::memcpy(to, edge, columns * sizeof(T));
    }
  }
}

template <class T, int Vectors, int Rows>
void tile_of(const Product<T>& p, int64_t rows, int64_t columns) {
  if (rows == Rows) return tile<T, Vectors, Rows>(p, columns);
  if constexpr (Rows > 1) tile_of<T, Vectors, Rows - 1>(p, rows, columns);
}

template <class T, int Vectors>
void tiles_down(Product<T> p, int64_t rows, int64_t columns) {
  constexpr int step = kTileRows<Vectors>;
  for (int64_t r = 0; r < rows; r += step) {
    tile_of<T, Vectors, step>(p, rows - r < step ? rows - r : step, columns);
    p.a += step * p.a_row;
    p.c += step * p.c_row;
    if (p.row_start != nullptr) p.row_start += step;
  }
}

// All rows of C by `columns` (at most a panel's). Rows of B must be readable to the end of their last vector.
template <class T>
void multiply(const Product<T>& p, int64_t rows, int64_t columns) {
  if (columns <= kLanes<T>) return tiles_down<T, 1>(p, rows, columns);
  if (kTileVectors == 2 || columns <= 2 * kLanes<T>) return tiles_down<T, 2>(p, rows, columns);
  if constexpr (kTileVectors == 4) tiles_down<T, 4>(p, rows, columns);
}

}  // namespace yolov9_fast::gemm
