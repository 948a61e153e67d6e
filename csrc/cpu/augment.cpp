// augment on the CPU: each pixel of the result once from its sources, in blocks of a row; no canvas and no intermediate
// image. Arithmetic and its order are OpenCV's (warpAffine, warpPerspective, addWeighted, cvtColor, LUT), so that
// results agree. A block that lies on one tile reads it directly, one outside all tiles is filled, others look at each
// pixel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/augment_colours.h"
#include "cpu/augment_rows.h"

namespace {

using namespace yolov9_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestSide = 32766;
constexpr int64_t kLargestPlace = int64_t{1} << 30;

struct Sample {
  View views[2];
  int count = 1;
  float share = 1, rest = 0;
  bool vertical = false, horizontal = false;
  const uint8_t* tables = nullptr;
  uint8_t grey[3];
};

void check(bool good, const char* name, const char* expected) {
  STD_TORCH_CHECK(good, "augment: ", name, ": expected ", expected);
}

void check_arguments(const Tensor& pixels, const Tensor& tiles, const Tensor& canvases, const Tensor& matrices,
                     const std::optional<Tensor>& tables, const Tensor& flips, const Tensor& shares, int64_t size) {
  check(pixels.dim() == 1 && pixels.scalar_type() == ScalarType::Byte && pixels.is_contiguous(), "pixels", "uint8 [n]");
  check(tiles.dim() == 4 && tiles.scalar_type() == ScalarType::Long && tiles.is_contiguous(), "tiles", "int64 [B, V, T, 5]");
  const int64_t batch = tiles.size(0), views = tiles.size(1);
  check((views == 1 || views == 2) && tiles.size(2) > 0 && tiles.size(3) == 5, "tiles", "[B, 1 or 2, T, 5]");
  check(canvases.dim() == 3 && canvases.size(0) == batch && canvases.size(1) == views && canvases.size(2) == 2 &&
            canvases.scalar_type() == ScalarType::Long && canvases.is_contiguous(),
        "canvases", "int64 [B, V, 2]");
  check(matrices.dim() == 4 && matrices.size(0) == batch && matrices.size(1) == views && matrices.size(2) == 3 &&
            matrices.size(3) == 3 && matrices.scalar_type() == ScalarType::Double && matrices.is_contiguous(),
        "matrices", "float64 [B, V, 3, 3]");
  if (tables) {
    check(tables->dim() == 3 && tables->size(0) == batch && tables->size(1) == 3 && tables->size(2) == 256 &&
              tables->scalar_type() == ScalarType::Byte && tables->is_contiguous(),
          "tables", "uint8 [B, 3, 256]");
  }
  check(flips.dim() == 2 && flips.size(0) == batch && flips.size(1) == 2 && flips.scalar_type() == ScalarType::Bool &&
            flips.is_contiguous(),
        "flips", "bool [B, 2]");
  check(shares.dim() == 1 && shares.size(0) == batch && shares.scalar_type() == ScalarType::Double &&
            shares.is_contiguous(),
        "shares", "float64 [B]");
  check(size >= 1 && size <= kLargestSide, "size", "1..32766");
}

// `rows`: offset, height, width, left, top of each tile.
View read_view(const uint8_t* pixels, int64_t bytes, const int64_t* rows, int64_t count, const int64_t* canvas,
               const double* matrix) {
  View view;
  check(canvas[0] >= 1 && canvas[0] <= kLargestSide && canvas[1] >= 1 && canvas[1] <= kLargestSide, "canvases",
        "sides of 1..32766");
  view.height = static_cast<int>(canvas[0]);
  view.width = static_cast<int>(canvas[1]);
  view.end = pixels + bytes;
  for (int i = 0; i < 9; ++i) view.matrix[i] = static_cast<float>(matrix[i]);
  for (int64_t t = 0; t < count; ++t, rows += 5) {
    const int64_t height = rows[1], width = rows[2], left = rows[3], top = rows[4];
    check(height >= 0 && height <= kLargestSide && width >= 0 && width <= kLargestSide, "tiles", "sides of 0..32766");
    check(std::abs(left) <= kLargestPlace && std::abs(top) <= kLargestPlace, "tiles", "places within 2^30");
    if (height == 0 || width == 0) continue;
    check(rows[0] >= 0 && rows[0] <= bytes - height * width * 3, "tiles", "images inside of pixels");
    Tile tile;
    tile.stride = width * 3;
    tile.base = pixels + rows[0] - top * tile.stride - left * 3;
    tile.x1 = static_cast<int>(std::max<int64_t>(left, 0));
    tile.y1 = static_cast<int>(std::max<int64_t>(top, 0));
    tile.x2 = static_cast<int>(std::min(left + width, canvas[1]));
    tile.y2 = static_cast<int>(std::min(top + height, canvas[0]));
    if (tile.x1 < tile.x2 && tile.y1 < tile.y2) view.tiles.push_back(tile);
  }
  return view;
}

// One block of a row; `out`: red, green and blue at the block's first pixel, which is its last where rows are mirrored.
void write_block(const Sample& sample, bool perspective, int y, int x, int count, uint8_t* const out[3]) {
  alignas(64) uint8_t first[3][kBlock], second[3][kBlock];
  bool seen = read_block(sample.views[0], perspective, y, x, count, first);
  if (sample.count == 2) {
    const bool other = read_block(sample.views[1], perspective, y, x, count, second);
    if (seen || other) {
      if (!seen) std::memset(first, kGrey, sizeof first);
      if (!other) std::memset(second, kGrey, sizeof second);
      blend(first, second, sample.share, sample.rest);
      seen = true;
    }
  }
  if (!seen) {
    for (int c = 0; c < 3; ++c) {
      std::memset(sample.horizontal ? out[c] - count + 1 : out[c], sample.grey[2 - c], count);
    }
    return;
  }
  if (sample.tables != nullptr) change_colours(sample.tables, first);
  for (int c = 0; c < 3; ++c) {
    const uint8_t* source = first[2 - c];
    if (sample.horizontal) {
      uint8_t* target = out[c] - count + 1;
      for (int k = 0; k < count; ++k) target[k] = source[count - 1 - k];
    } else {
      std::memcpy(out[c], source, count);
    }
  }
}

Tensor augment(const Tensor& pixels, const Tensor& tiles, const Tensor& canvases, const Tensor& matrices,
               std::optional<Tensor> tables, const Tensor& flips, const Tensor& shares, int64_t size,
               bool perspective) {
  check_arguments(pixels, tiles, canvases, matrices, tables, flips, shares, size);
  const int64_t batch = tiles.size(0), views = tiles.size(1), count = tiles.size(2), bytes = pixels.size(0);
  Tensor result = torch::stable::new_empty(pixels, {batch, 3, size, size});
  const auto* source = static_cast<const uint8_t*>(pixels.const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(tiles.const_data_ptr());
  const auto* sides = static_cast<const int64_t*>(canvases.const_data_ptr());
  const auto* maps = static_cast<const double*>(matrices.const_data_ptr());
  const auto* mirrored = static_cast<const bool*>(flips.const_data_ptr());
  const auto* parts = static_cast<const double*>(shares.const_data_ptr());
  const auto* colours = tables ? static_cast<const uint8_t*>(tables->const_data_ptr()) : nullptr;
  std::vector<Sample> samples(batch);
  for (int64_t b = 0; b < batch; ++b) {
    Sample& sample = samples[b];
    for (int64_t v = 0; v < views; ++v) {
      const int64_t at = b * views + v;
      if (v == 1 && sides[2 * at] == 0 && sides[2 * at + 1] == 0) continue;
      sample.views[v] = read_view(source, bytes, rows + at * count * 5, count, sides + 2 * at, maps + 9 * at);
      sample.count = static_cast<int>(v) + 1;
    }
    sample.share = static_cast<float>(parts[b]);
    sample.rest = static_cast<float>(1 - parts[b]);
    sample.vertical = mirrored[2 * b];
    sample.horizontal = mirrored[2 * b + 1];
    std::fill_n(sample.grey, 3, kGrey);
    if (colours != nullptr) {
      sample.tables = colours + b * 768;
      alignas(64) uint8_t block[3][kBlock];
      std::memset(block, kGrey, sizeof block);
      change_colours(sample.tables, block);
      for (int c = 0; c < 3; ++c) sample.grey[c] = block[c][0];
    }
  }
  auto* target = static_cast<uint8_t*>(result.mutable_data_ptr());
  const int side = static_cast<int>(size);
  // Rows of about 16,000 pixels are some 50 us of work, where a second thread pays.
  torch::stable::parallel_for(0, batch * size, 1 + 16384 / size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Sample& sample = samples[row / size];
      const int y = static_cast<int>(row % size);
      uint8_t* plane = target + row / size * 3 * size * size + (sample.vertical ? size - 1 - y : y) * size;
      for (int x = 0; x < side; x += kBlock) {
        uint8_t* start = plane + (sample.horizontal ? side - 1 - x : x);
        uint8_t* out[3] = {start, start + size * size, start + 2 * size * size};
        write_block(sample, perspective, y, x, std::min(kBlock, side - x), out);
      }
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) { library.impl("augment", TORCH_BOX(&augment)); }
