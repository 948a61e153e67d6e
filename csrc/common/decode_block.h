// decode on the GPU, as phases between barriers that also run on the host: a block transposes a tile of 64 anchors
// in shared memory, so that it reads in the order of the map, in either layout, and writes in the order of the result.
#pragma once

#include "common/block.h"
#include "common/decode.h"
#include "common/raw_maps.h"

namespace yolov9_fast::decoding {

constexpr int kTile = 64;          // anchors
constexpr int kChannels = 64;      // at a time: the bins, then the classes
constexpr int kPitch = kTile + 1;  // no multiple of the number of banks, so that transposing has no conflicts

template <class T, class Real>
struct Problem {
  Levels<T> maps;
  Real* out;              // [B, 4 + nc, A], or null
  Real* scores;           // [B, rows, A]
  Real* boxes;            // [B, A, 4]
  Real* points;           // [A, 2]
  const int64_t* labels;  // [B, rows], or null for all classes
  int64_t rows;

  YF_HOST_DEVICE int64_t tiles_of(int level) const { return (maps.level[level].pixels + kTile - 1) / kTile; }

  YF_HOST_DEVICE int64_t blocks() const {
    int64_t tiles = 0;
    for (int l = 0; l < maps.count; ++l) tiles += tiles_of(l);
    return tiles * maps.batch;
  }
};

template <class Real>
struct Shared {
  Real channel[kChannels * kPitch];
  Real side[kSides][kTile];
};

template <class T, class Real>
struct Tile {
  const Level<T>* level;
  int64_t image, first, anchor;  // first: pixel of the level; anchor: of the image
  int count;

  YF_HOST_DEVICE Tile(const Problem<T, Real>& p, int64_t index) {
    int l = 0;
    while (index >= p.tiles_of(l) * p.maps.batch) index -= p.tiles_of(l++) * p.maps.batch;
    level = &p.maps.level[l];
    image = index / p.tiles_of(l);
    first = index % p.tiles_of(l) * kTile;
    anchor = level->first_anchor + first;
    count = static_cast<int>(level->pixels - first < kTile ? level->pixels - first : kTile);
  }

  YF_HOST_DEVICE const T* at(int64_t channel, int i) const {
    return level->data + image * level->at.image + channel * level->at.channel + (first + i) * level->at.pixel;
  }
};

template <class T, class Real, class Block>
YF_BLOCK void load(const Block& block, Shared<Real>& shared, const Tile<T, Real>& tile, int64_t from, int channels) {
  const bool by_channel = tile.level->at.channel == 1 && tile.level->at.pixel != 1;
  block.phase([&](int t) {
    for (int i = t; i < channels * tile.count; i += block.threads()) {
      const int c = by_channel ? i % channels : i / tile.count, a = by_channel ? i / channels : i % tile.count;
      shared.channel[c * kPitch + a] = static_cast<Real>(*tile.at(from + c, a));
    }
  });
}

template <class T, class Real, class Block>
YF_BLOCK void sides(const Block& block, Shared<Real>& shared, const Tile<T, Real>& tile) {
  load(block, shared, tile, 0, kBoxChannels);
  block.phase([&](int t) {
    for (int i = t; i < kSides * kTile; i += block.threads()) {
      const int side = i / kTile, a = i % kTile;
      if (a < tile.count) shared.side[side][a] = expected_side(shared.channel + side * kBins * kPitch + a, kPitch);
    }
  });
}

// Boxes and the scores of all classes: reads every channel once, writes 4 + nc numbers per anchor.
template <class T, class Real, class Block>
YF_BLOCK void decode_block(const Block& block, Shared<Real>& shared, const Problem<T, Real>& p, int64_t index) {
  const Tile<T, Real> tile(p, index);
  const Real stride = static_cast<Real>(tile.level->stride);
  Real* out = p.out + tile.image * (p.maps.channels - kBoxChannels + kSides) * p.maps.anchors + tile.anchor;
  sides(block, shared, tile);
  block.phase([&](int t) {
    for (int i = t; i < 4 * kTile; i += block.threads()) {
      const int what = i / kTile, axis = what % 2, a = i % kTile;
      if (a >= tile.count) continue;
      const int64_t pixel = tile.first + a;
      const Real cell = static_cast<Real>(axis == 0 ? pixel % tile.level->width : pixel / tile.level->width);
      const Real before = shared.side[axis][a], after = shared.side[axis + 2][a];
      out[what * p.maps.anchors + a] =
          what < 2 ? box_centre(cell, before, after, stride) : box_length(cell, before, after, stride);
    }
  });
  for (int64_t from = kBoxChannels; from < p.maps.channels; from += kChannels) {
    const int64_t left = p.maps.channels - from;
    const int channels = static_cast<int>(left < kChannels ? left : kChannels);
    load(block, shared, tile, from, channels);
    block.phase([&](int t) {
      for (int i = t; i < channels * tile.count; i += block.threads()) {
        const int c = i / tile.count, a = i % tile.count;
        out[(from - kBoxChannels + kSides + c) * p.maps.anchors + a] = sigmoid(shared.channel[c * kPitch + a]);
      }
    });
  }
}

// What the assignment reads; a label out of range scores NaN.
template <class T, class Real, class Block>
YF_BLOCK void assignment_block(const Block& block, Shared<Real>& shared, const Problem<T, Real>& p, int64_t index) {
  const Tile<T, Real> tile(p, index);
  const Real stride = static_cast<Real>(tile.level->stride);
  const int64_t classes = p.maps.channels - kBoxChannels;
  sides(block, shared, tile);
  block.phase([&](int t) {
    for (int i = t; i < 4 * tile.count; i += block.threads()) {
      const int coordinate = i % 4, a = i / 4;
      const int64_t pixel = tile.first + a;
      const Real cell = static_cast<Real>(coordinate % 2 == 0 ? pixel % tile.level->width : pixel / tile.level->width);
      p.boxes[(tile.image * p.maps.anchors + tile.anchor + a) * 4 + coordinate] =
          box_corner(coordinate, cell, shared.side[coordinate][a], stride);
      if (tile.image == 0 && coordinate < 2) p.points[2 * (tile.anchor + a) + coordinate] = (cell + Real(0.5)) * stride;
    }
    for (int64_t i = t; i < p.rows * tile.count; i += block.threads()) {
      const int64_t n = i / tile.count;
      const int a = static_cast<int>(i % tile.count);
      const int64_t label = p.labels == nullptr ? n : p.labels[tile.image * p.rows + n];
      const bool known = label >= 0 && label < classes;
      p.scores[(tile.image * p.rows + n) * p.maps.anchors + tile.anchor + a] =
          known ? sigmoid(static_cast<Real>(*tile.at(kBoxChannels + label, a))) : Real(NAN);
    }
  });
}

}  // namespace yolov9_fast::decoding
