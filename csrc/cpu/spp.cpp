// spp on the CPU: three stacked 5×5 max pools of stride 1 and their gradient, in one pass over blocks of channels whose
// planes stay in the cache. Forward reads x and writes three maps; backward reads seven maps and writes one. No indices
// are kept: the backward finds the maxima again.
#include <vector>

#include "cpu/channel_blocks.h"

namespace {

using namespace yolov9_fast;

constexpr char kOp[] = "spp";
constexpr int64_t kReach = 2;  // 5×5 with padding 2

// The pool of one block of channels: [H·W][kBlock].
template <class A>
struct Pool {
  using Values = typename Block<A>::Values;
  using Positions = typename Block<A>::Positions;
  using Position = typename Block<A>::Position;

  int64_t height, width;
  std::vector<A> row_maxima;  // the maximum of each row of a window
  std::vector<Position> row_of,
      column_of;  // of the maximum: its row, and in each row its column, from the window's centre
  std::vector<A> carried;

  Pool(int64_t h, int64_t w, bool with_gradient) : height(h), width(w), row_maxima(h * w * kBlock) {
    if (with_gradient) {
      row_of.resize(h * w * kBlock);
      column_of.resize(h * w * kBlock);
      carried.resize(h * w * kBlock);
    }
  }

  // One direction: `length` positions at distance `step`. As in torch's max_pool2d, the first maximum of a window wins,
  // and a NaN wins over everything before it.
  template <bool WithPositions>
  static void line(const A* from, A* best, Position* position, int64_t length, int64_t step) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t first = std::max<int64_t>(0, i - kReach), last = std::min(length - 1, i + kReach);
      Values value = load_block<Values>(from + first * step);
      Positions where = Positions{} + static_cast<Position>(first - i);
      for (int64_t j = first + 1; j <= last; ++j) {
        const Values next = load_block<Values>(from + j * step);
        const Positions better = (next > value) | (next != next);
        value = better ? next : value;
        if constexpr (WithPositions) where = better ? Positions{} + static_cast<Position>(j - i) : where;
      }
      store_block(best + i * step, value);
      if constexpr (WithPositions) store_block(position + i * step, where);
    }
  }

  void forward(const A* x, A* y) {
    const int64_t row = width * kBlock;
    for (int64_t h = 0; h < height; ++h) line<false>(x + h * row, row_maxima.data() + h * row, nullptr, width, kBlock);
    for (int64_t w = 0; w < row; w += kBlock) line<false>(row_maxima.data() + w, y + w, nullptr, height, row);
  }

  // to[j] += the sum of from[i] over those i whose maximum is at j.
  static void collect(const A* from, const Position* position, A* to, int64_t length, int64_t step) {
    for (int64_t j = 0; j < length; ++j) {
      Values sum = load_block<Values>(to + j * step);
      for (int64_t i = std::max<int64_t>(0, j - kReach); i <= std::min(length - 1, j + kReach); ++i) {
        const Positions chosen =
            load_block<Positions>(position + i * step) == Positions{} + static_cast<Position>(j - i);
        sum += chosen ? load_block<Values>(from + i * step) : Values{};
      }
      store_block(to + j * step, sum);
    }
  }

  // dx += the gradient of the pool of x for dy. A window's maximum is the maximum of its rows' maxima, in the same
  // order.
  void backward(const A* x, const A* dy, A* dx) {
    const int64_t row = width * kBlock;
    for (int64_t h = 0; h < height; ++h) {
      line<true>(x + h * row, row_maxima.data() + h * row, column_of.data() + h * row, width, kBlock);
    }
    // The maxima themselves are not needed: they go into `carried`, which is free until the gradients are collected.
    for (int64_t w = 0; w < row; w += kBlock) {
      line<true>(row_maxima.data() + w, carried.data() + w, row_of.data() + w, height, row);
    }
    std::fill(carried.begin(), carried.end(), A(0));
    for (int64_t w = 0; w < row; w += kBlock) collect(dy + w, row_of.data() + w, carried.data() + w, height, row);
    for (int64_t h = 0; h < height; ++h) {
      collect(carried.data() + h * row, column_of.data() + h * row, dx + h * row, width, kBlock);
    }
  }
};

// The view of `tensor` in the layout of x, after a check that it has the shape and dtype of x.
FeatureMap map_like(const FeatureMap& x, const Tensor& of_x, const Tensor& tensor, const char* name) {
  const FeatureMap map = feature_map(tensor, kOp, name, x.layout);
  STD_TORCH_CHECK(map.same_shape(x) && tensor.scalar_type() == of_x.scalar_type(), kOp, ": ", name,
                  ": expected the shape and dtype of x");
  return map;
}

template <class T>
void pool_three(const FeatureMap& x, const FeatureMap (&y)[3]) {
  using A = Compute<T>;
  over_blocks(x, [&](const Share& share) {
    Pool<A> pool(x.height, x.width, false);
    std::vector<A> from(x.pixels() * kBlock), to(x.pixels() * kBlock);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t n = share.image(block), c = share.channel(block);
      load_rows<T>(x, n, c, 0, x.pixels(), from.data());
      for (const FeatureMap& map : y) {
        pool.forward(from.data(), to.data());
        store_rows<T>(map, n, c, 0, x.pixels(), to.data());
        from.swap(to);
      }
    }
  });
}

// The view of the first of `tensors`, x, in a layout that all have.
FeatureMap first_of(const std::vector<Tensor>& tensors) {
  for (const Tensor& map : tensors)
    STD_TORCH_CHECK(map.dim() == 4, kOp, ": expected [B, C, H, W], got ", map.dim(), " dimensions");
  return feature_map(tensors.front(), kOp, "x", common_layout(tensors));
}

void spp_forward(const Tensor& x, Tensor y1, Tensor y2, Tensor y3) {
  const FeatureMap map = first_of({x, y1, y2, y3});
  const FeatureMap out[3] = {map_like(map, x, y1, "y1"), map_like(map, x, y2, "y2"), map_like(map, x, y3, "y3")};
  if (map.empty()) return;
  dispatch(x.scalar_type(), kOp, "x", [&](auto zero) { pool_three<decltype(zero)>(map, out); });
}

// maps: x, y1, y2, the inputs of the pools; gradients: d0 of x, d1, d2, d3 of the pools' outputs.
template <class T>
void pool_three_backward(const FeatureMap (&maps)[3], const FeatureMap (&gradients)[4], const FeatureMap& dx) {
  using A = Compute<T>;
  over_blocks(dx, [&](const Share& share) {
    const int64_t pixels = dx.pixels();
    Pool<A> pool(dx.height, dx.width, true);
    std::vector<A> values(pixels * kBlock), upper(pixels * kBlock), lower(pixels * kBlock);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t n = share.image(block), c = share.channel(block);
      load_rows<T>(gradients[3], n, c, 0, pixels, upper.data());
      for (int level = 2; level >= 0; --level) {
        load_rows<T>(maps[level], n, c, 0, pixels, values.data());
        load_rows<T>(gradients[level], n, c, 0, pixels, lower.data());
        pool.backward(values.data(), upper.data(), lower.data());
        upper.swap(lower);
      }
      store_rows<T>(dx, n, c, 0, pixels, upper.data());
    }
  });
}

Tensor spp_backward(const Tensor& x, const Tensor& y1, const Tensor& y2, const Tensor& d0, const Tensor& d1,
                    const Tensor& d2, const Tensor& d3) {
  const FeatureMap map = first_of({x, y1, y2, d0, d1, d2, d3});
  const FeatureMap maps[3] = {map, map_like(map, x, y1, "y1"), map_like(map, x, y2, "y2")};
  const FeatureMap gradients[4] = {map_like(map, x, d0, "d0"), map_like(map, x, d1, "d1"), map_like(map, x, d2, "d2"),
                                   map_like(map, x, d3, "d3")};
  Tensor result = empty_map(x);
  if (map.empty()) return result;
  const FeatureMap dx = feature_map(result, kOp, "dx", map.layout);
  dispatch(x.scalar_type(), kOp, "x", [&](auto zero) { pool_three_backward<decltype(zero)>(maps, gradients, dx); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("spp_forward", TORCH_BOX(&spp_forward));
  library.impl("spp_backward", TORCH_BOX(&spp_backward));
}
