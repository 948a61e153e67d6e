// decode on the CPU: reads the maps once, writes every result once. Tiles of 64 anchors are transposed so that
// anchors are adjacent in either layout of the map; all arithmetic then runs over full vectors of anchors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/decode_arguments.h"
#include "cpu/rows.h"

namespace {

using namespace yolov9_fast;
using namespace yolov9_fast::decoding;

constexpr int kTile = 64;  // anchors; their bins take 16 KiB as float

struct Tile {
  int level;
  int64_t image, first;
  int count;
};

template <class T>
std::vector<Tile> tiles_of(const Levels<T>& maps) {
  std::vector<Tile> tiles;
  for (int l = 0; l < maps.count; ++l) {
    for (int64_t image = 0; image < maps.batch; ++image) {
      for (int64_t first = 0; first < maps.level[l].pixels; first += kTile) {
        const int64_t count = std::min<int64_t>(kTile, maps.level[l].pixels - first);
        tiles.push_back({l, image, first, static_cast<int>(count)});
      }
    }
  }
  return tiles;
}

// Channels [from, to) of a tile with adjacent anchors: channel c at out[(c - from) * kTile].
template <class T, class Real>
void load_tile(const Level<T>& level, const Tile& tile, int64_t from, int64_t to, Real* out) {
  const T* source = level.data + tile.image * level.at.image + tile.first * level.at.pixel + from * level.at.channel;
  const int64_t channels = to - from;
  if (level.at.pixel == 1 || channels > kBoxChannels) {
    for (int64_t c = 0; c < channels; ++c)
      load_run(source + c * level.at.channel, level.at.pixel, out + c * kTile, tile.count);
    return;
  }
  Real row[kBoxChannels];
  for (int i = 0; i < tile.count; ++i) {
    load_run(source + i * level.at.pixel, level.at.channel, row, channels);
    for (int64_t c = 0; c < channels; ++c) out[c * kTile + i] = row[c];
  }
}

// Means of the four sides of all kTile lanes; those after the tile's last anchor are not used.
template <class Real>
void expected_sides(const Real* bins, Real* sides) {
  for (int side = 0; side < kSides; ++side) {
    const Real* mine = bins + side * kBins * kTile;
    Real greatest[kTile], sum[kTile] = {}, first[kTile] = {};
    for (int i = 0; i < kTile; ++i) greatest[i] = mine[i];
    for (int k = 1; k < kBins; ++k) {
      for (int i = 0; i < kTile; ++i)
        greatest[i] = mine[k * kTile + i] > greatest[i] ? mine[k * kTile + i] : greatest[i];
    }
    for (int k = 0; k < kBins; ++k) {
      for (int i = 0; i < kTile; ++i) {
        const Real e = exp_not_positive(mine[k * kTile + i] - greatest[i]);
        sum[i] += e;
        first[i] += e * Real(k);
      }
    }
    for (int i = 0; i < kTile; ++i) sides[side * kTile + i] = first[i] / sum[i];
  }
}

template <class T, class Real>
struct Cells {
  Real column[kTile], row[kTile];

  Cells(const Level<T>& level, const Tile& tile) {
    int64_t x = tile.first % level.width, y = tile.first / level.width;
    for (int i = 0; i < kTile; ++i) {
      column[i] = static_cast<Real>(x);
      row[i] = static_cast<Real>(y);
      if (++x == level.width) {
        x = 0;
        ++y;
      }
    }
  }
};

template <class Real>
void sigmoid_run(const Real* logits, Real* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = sigmoid(logits[i]);
}

// The four means of a tile. Lanes after the last anchor are zero: no denormal or NaN slows them down.
template <class T, class Real>
void sides_of_tile(const Level<T>& level, const Tile& tile, Real* sides) {
  Real bins[kBoxChannels * kTile];
  if (tile.count < kTile) std::fill(bins, bins + kBoxChannels * kTile, Real(0));
  load_tile(level, tile, 0, kBoxChannels, bins);
  expected_sides(bins, sides);
}

template <class T, class Real>
void decode_tile(const Levels<T>& maps, const Tile& tile, Real* out) {
  const Level<T>& level = maps.level[tile.level];
  const Cells<T, Real> cells(level, tile);
  const Real stride = static_cast<Real>(level.stride);
  Real sides[kSides * kTile], logits[kBoxChannels * kTile];
  sides_of_tile(level, tile, sides);
  Real* first =
      out + (tile.image * (maps.channels - kBoxChannels + kSides)) * maps.anchors + level.first_anchor + tile.first;
  for (int axis = 0; axis < 2; ++axis) {
    const Real* cell = axis == 0 ? cells.column : cells.row;
    const Real *before = sides + axis * kTile, *after = sides + (axis + 2) * kTile;
    for (int i = 0; i < tile.count; ++i)
      first[axis * maps.anchors + i] = box_centre(cell[i], before[i], after[i], stride);
    for (int i = 0; i < tile.count; ++i) {
      first[(axis + 2) * maps.anchors + i] = box_length(cell[i], before[i], after[i], stride);
    }
  }
  for (int64_t from = kBoxChannels; from < maps.channels; from += kBoxChannels) {
    const int64_t to = std::min<int64_t>(maps.channels, from + kBoxChannels);
    load_tile(level, tile, from, to, logits);
    for (int64_t c = from; c < to; ++c) {
      sigmoid_run(logits + (c - from) * kTile, first + (c - kBoxChannels + kSides) * maps.anchors, tile.count);
    }
  }
}

// Boxes as corners, and the scores of the wanted classes: row n of an image is class labels[n], or class n without
// labels.
template <class T, class Real>
void assignment_tile(const Levels<T>& maps, const Tile& tile, const int64_t* labels, int64_t rows, Real* scores,
                     Real* boxes, Real* points) {
  const Level<T>& level = maps.level[tile.level];
  const Cells<T, Real> cells(level, tile);
  const Real stride = static_cast<Real>(level.stride);
  Real sides[kSides * kTile], logits[kTile];
  sides_of_tile(level, tile, sides);
  const int64_t anchor = level.first_anchor + tile.first;
  Real* box = boxes + (tile.image * maps.anchors + anchor) * 4;
  for (int i = 0; i < tile.count; ++i) {
    for (int coordinate = 0; coordinate < 4; ++coordinate) {
      const Real cell = coordinate % 2 == 0 ? cells.column[i] : cells.row[i];
      box[4 * i + coordinate] = box_corner(coordinate, cell, sides[coordinate * kTile + i], stride);
    }
  }
  if (tile.image == 0) {
    for (int i = 0; i < tile.count; ++i) {
      points[2 * (anchor + i)] = (cells.column[i] + Real(0.5)) * stride;
      points[2 * (anchor + i) + 1] = (cells.row[i] + Real(0.5)) * stride;
    }
  }
  const T* source = level.data + tile.image * level.at.image + tile.first * level.at.pixel;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t label = labels == nullptr ? n : labels[tile.image * rows + n];
    STD_TORCH_CHECK(label >= 0 && label < maps.channels - kBoxChannels, kOp, ": labels: expected values in [0, ",
                    maps.channels - kBoxChannels, "), got ", label);
    load_run(source + (kBoxChannels + label) * level.at.channel, level.at.pixel, logits, tile.count);
    sigmoid_run(logits, scores + (tile.image * rows + n) * maps.anchors + anchor, tile.count);
  }
}

Tensor decode_forward(const std::vector<Tensor>& maps, const std::vector<int64_t>& strides) {
  Tensor out;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const Levels<T> levels = raw_maps<T>(maps, {}, strides, kOp);
    out = decoded<T, Real>(maps, levels);
    const std::vector<Tile> tiles = tiles_of(levels);
    Real* result = data_of<Real>(out);
    torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) decode_tile<T, Real>(levels, tiles[i], result);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> decode_for_assignment(const std::vector<Tensor>& maps,
                                                         const std::optional<Tensor>& labels,
                                                         const std::vector<int64_t>& strides) {
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch_maps(maps, kOp, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const Levels<T> levels = raw_maps<T>(maps, {}, strides, kOp);
    const ForAssignment<Real> wanted(maps, levels, labels);
    const std::vector<Tile> tiles = tiles_of(levels);
    Real *scores = data_of<Real>(wanted.scores), *boxes = data_of<Real>(wanted.boxes);
    Real* points = data_of<Real>(wanted.points);
    torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        assignment_tile<T, Real>(levels, tiles[i], wanted.labels, wanted.rows, scores, boxes, points);
      }
    });
    results = wanted.results();
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("decode_forward", TORCH_BOX(&decode_forward));
  library.impl("decode_for_assignment", TORCH_BOX(&decode_for_assignment));
}
