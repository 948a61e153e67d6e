// The GPU's suppression as phases of a block of threads (common/block.h): one block per image, early exit at max_det.
//
// The candidates are 64-bit keys in any order, the larger the better, all different. In rounds the block finds the best
// `sorted` of those left by radix selection, sorts them, and takes them tile by tile: all candidates of a tile are
// compared with the survivors so far (chains by label), then with one another as a matrix of bits, which is resolved by
// repeating "survives unless a survivor removes it". Threads add and append in an order that varies; no result depends
// on it.
#pragma once

#include <cstdint>

#include "common/block.h"
#include "common/nms.h"

namespace yolov9_fast::suppression {

// Sorted: keys of a round, a power of two. Tile: candidates looked at together, a multiple of 32. DigitBits: of the
// radix selection. HeadBits: 2^HeadBits chains of survivors. Slack: keys beyond max_candidates that the filter may
// store.
template <int SortedKeys, int TileSize, int DigitBits, int HeadBits, int SlackKeys>
struct Sizes {
  static constexpr int kSorted = SortedKeys, kTile = TileSize, kWords = TileSize / 32;
  static constexpr int kDigitBits = DigitBits, kBuckets = 1 << DigitBits;
  static constexpr int kHeadBits = HeadBits, kHeads = 1 << HeadBits;
  static constexpr int kSlack = SlackKeys;
};
// 2048 keys sort in 66 steps and fill 16 KB; everything stays within 48 KB of shared memory.
using FullSizes = Sizes<2048, 256, 11, 10, 4096>;
// For tests: a few dozen candidates need several rounds, tiles, digits and colliding chains.
using SmallSizes = Sizes<64, 32, 4, 1, 8>;

template <class Number>
YF_BLOCK Number fetch_add(Number* where, Number value) {
#ifdef YF_CUDA
  return atomicAdd(where, value);
#else
  const Number before = *where;
  *where += value;
  return before;
#endif
}

YF_BLOCK int exchange(int* where, int value) {
#ifdef YF_CUDA
  return atomicExch(where, value);
#else
  const int before = *where;
  *where = value;
  return before;
#endif
}

YF_BLOCK int count_bits(uint32_t word) {
#ifdef YF_CUDA
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// One digit of a key: bits [shift, above), counted from level 0 at the top.
template <class S>
struct Digit {
  YF_BLOCK explicit Digit(int level)
      : above(64 - S::kDigitBits * level), shift(above > S::kDigitBits ? above - S::kDigitBits : 0) {}

  YF_BLOCK int of(uint64_t key) const { return static_cast<int>(key >> shift) & (S::kBuckets - 1) & mask(); }
  YF_BLOCK bool shares_prefix(uint64_t key, uint64_t prefix) const {
    return above >= 64 || (key ^ prefix) >> above == 0;
  }
  YF_BLOCK bool last() const { return shift == 0; }
  YF_BLOCK int mask() const { return (1 << (above - shift)) - 1; }

  int above, shift;
};

template <class S>
struct FindShared {
  static constexpr int kParts = S::kBuckets < 64 ? S::kBuckets : 64;
  uint32_t part[kParts];
  int bucket;        // that of the `need`-th key from the top
  uint32_t greater;  // keys in the buckets above it
  uint32_t total;
};

// The bucket of the need-th key from the top (1 the first); bucket −1 where there are fewer keys.
template <class S, class Block>
YF_BLOCK void find_bucket(const Block& block, FindShared<S>& shared, const uint32_t* histogram, uint32_t need) {
  constexpr int kParts = FindShared<S>::kParts, kEach = S::kBuckets / kParts;
  block.phase([&](int t) {
    for (int part = t; part < kParts; part += block.threads()) {
      uint32_t sum = 0;
      for (int i = 0; i < kEach; ++i) sum += histogram[part * kEach + i];
      shared.part[part] = sum;
    }
  });
  block.phase([&](int t) {
    if (t != 0) return;
    uint32_t sum = 0, greater = 0;
    int chosen = -1;
    for (int part = kParts - 1; part >= 0; --part) {
      if (chosen < 0 && sum + shared.part[part] >= need) {
        chosen = part;
        greater = sum;
      }
      sum += shared.part[part];
    }
    int bucket = -1;
    if (chosen >= 0) {
      bucket = chosen * kEach + kEach - 1;
      for (; greater + histogram[bucket] < need; --bucket) greater += histogram[bucket];
    }
    shared.bucket = bucket;
    shared.greater = greater;
    shared.total = sum;
  });
}

// A survivor, and the next of its chain.
struct Kept {
  Corners box;
  float area;
  int next;
  int64_t label;
};

struct Candidate {
  Corners box;
  float area;
  int64_t label;
};

template <class S>
struct Shared {
  uint64_t keys[S::kSorted];
  union {
    uint32_t histogram[S::kBuckets];
    uint32_t removers[S::kWords * S::kTile];  // [word][candidate]: which of the tile remove it, if they survive
  };
  float x1[S::kTile], y1[S::kTile], x2[S::kTile], y2[S::kTile], area[S::kTile];
  int64_t label[S::kTile];
  uint8_t alive[S::kTile], survives[S::kTile];
  uint32_t surviving[S::kWords];
  int heads[S::kHeads];
  int changed[2];
  int count;
  FindShared<S> find;
};

template <class S>
YF_BLOCK int chain_of(int64_t label) {
  return static_cast<int>(static_cast<uint64_t>(label) * 0x9E3779B97F4A7C15ull >> (64 - S::kHeadBits));
}

// The least key of the next round: at most kSorted of the keys up to `bound` are as great, and more than kSorted are
// left.
template <class S, class Block>
YF_BLOCK uint64_t select(const Block& block, Shared<S>& shared, const uint64_t* keys, int64_t stored, uint64_t bound) {
  uint64_t prefix = 0;
  uint32_t taken = 0;
  for (int level = 0;; ++level) {
    const Digit<S> digit(level);
    block.phase([&](int t) {
      for (int i = t; i < S::kBuckets; i += block.threads()) shared.histogram[i] = 0;
    });
    block.phase([&](int t) {
      for (int64_t i = t; i < stored; i += block.threads()) {
        const uint64_t key = keys[i];
        if (key <= bound && digit.shares_prefix(key, prefix)) fetch_add(&shared.histogram[digit.of(key)], uint32_t{1});
      }
    });
    // The first key too many: all keys above its bucket fit.
    find_bucket<S>(block, shared.find, shared.histogram, S::kSorted + 1 - taken);
    const uint64_t bucket = static_cast<uint64_t>(shared.find.bucket);
    const uint32_t greater = taken + shared.find.greater;
    if (greater >= S::kSorted / 2 || digit.last()) return prefix + ((bucket + 1) << digit.shift);
    prefix |= bucket << digit.shift;
    taken = greater;
  }
}

// Descending order of keys[0, count) in shared memory: bitonic, filled up with zeros to a power of two.
template <class S, class Block>
YF_BLOCK void sort(const Block& block, Shared<S>& shared, int count) {
  int width = 1;
  while (width < count) width *= 2;
  block.phase([&](int t) {
    for (int i = count + t; i < width; i += block.threads()) shared.keys[i] = 0;
  });
  for (int size = 2; size <= width; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      block.phase([&](int t) {
        for (int pair = t; pair < width / 2; pair += block.threads()) {
          const int low = 2 * pair - (pair & (step - 1)), high = low + step;
          const uint64_t a = shared.keys[low], b = shared.keys[high];
          const bool descending = (low & size) == 0;
          if ((a < b) == descending) {
            shared.keys[low] = b;
            shared.keys[high] = a;
          }
        }
      });
    }
  }
}

// Which of the tile's `count` candidates survive, as bits in shared.surviving.
template <class S, class Block>
YF_BLOCK void resolve(const Block& block, Shared<S>& shared, int count, float iou) {
  // Lanes of a warp have one word and neighbouring candidates: they read the same or adjacent memory.
  block.phase([&](int t) {
    for (int item = t; item < S::kWords * S::kTile; item += block.threads()) {
      const int i = item % S::kTile, first = item / S::kTile * 32;
      uint32_t bits = 0;
      if (i < count && shared.alive[i]) {
        const int end = first + 32 < i ? first + 32 : i;
        for (int j = first; j < end; ++j) {
          if (!shared.alive[j] || shared.label[j] != shared.label[i]) continue;
          const bool over = overlaps(shared.x1[i], shared.y1[i], shared.x2[i], shared.y2[i], shared.area[i],
                                     shared.x1[j], shared.y1[j], shared.x2[j], shared.y2[j], shared.area[j], iou);
          bits |= static_cast<uint32_t>(over) << (j - first);
        }
      }
      shared.removers[item] = bits;
    }
  });
  const auto gather_word = [&](const uint8_t* flags, int word) {
    uint32_t bits = 0;
    for (int i = 32 * word; i < 32 * word + 32 && i < count; ++i) {
      bits |= static_cast<uint32_t>(flags[i]) << (i - 32 * word);
    }
    return bits;
  };
  block.phase([&](int t) {
    for (int word = t; word < S::kWords; word += block.threads())
      shared.surviving[word] = gather_word(shared.alive, word);
  });
  // Ends: after r turns the first r candidates are settled.
  for (int turn = 0;; ++turn) {
    // Two flags in turn: one is cleared while the other may still be read.
    int& changed = shared.changed[turn & 1];
    block.phase([&](int t) {
      if (t == 0) changed = 0;
      for (int i = t; i < count; i += block.threads()) {
        uint32_t removed = 0;
        for (int word = 0; word < S::kWords; ++word) {
          removed |= shared.removers[word * S::kTile + i] & shared.surviving[word];
        }
        shared.survives[i] = shared.alive[i] && removed == 0;
      }
    });
    block.phase([&](int t) {
      for (int word = t; word < S::kWords; word += block.threads()) {
        const uint32_t bits = gather_word(shared.survives, word);
        if (bits == shared.surviving[word]) continue;
        shared.surviving[word] = bits;
        changed = 1;
      }
    });
    if (!changed) return;
  }
}

// Suppression among keys[0, stored), of which the best `limit` count. `source(key)` gives the candidate, `write(place,
// key)` stores a survivor, `kept` has room for max_det. Returns how many survive.
template <class S, class Block, class Source, class Write>
YF_BLOCK int64_t greedy(const Block& block, Shared<S>& shared, const uint64_t* keys, int64_t stored, int64_t limit,
                        int64_t max_det, float iou, Kept* kept, const Source& source, const Write& write) {
  block.phase([&](int t) {
    for (int i = t; i < S::kHeads; i += block.threads()) shared.heads[i] = -1;
  });
  if (limit > stored) limit = stored;
  uint64_t bound = ~uint64_t{0};
  int64_t seen = 0, survivors = 0;
  while (seen < limit && survivors < max_det) {
    const uint64_t least = stored - seen > S::kSorted ? select<S>(block, shared, keys, stored, bound) : 0;
    block.phase([&](int t) {
      if (t == 0) shared.count = 0;
    });
    block.phase([&](int t) {
      for (int64_t i = t; i < stored; i += block.threads()) {
        const uint64_t key = keys[i];
        if (key >= least && key <= bound) shared.keys[fetch_add(&shared.count, 1)] = key;
      }
    });
    const int count = shared.count;
    sort<S>(block, shared, count);
    const int usable = limit - seen < count ? static_cast<int>(limit - seen) : count;
    for (int first = 0; first < usable && survivors < max_det; first += S::kTile) {
      const int size = usable - first < S::kTile ? usable - first : S::kTile;
      block.phase([&](int t) {
        for (int i = t; i < size; i += block.threads()) {
          const Candidate candidate = source(shared.keys[first + i]);
          const Corners& box = candidate.box;
          bool alive = true;
          for (int at = shared.heads[chain_of<S>(candidate.label)]; at >= 0 && alive; at = kept[at].next) {
            const Kept& other = kept[at];
            alive = other.label != candidate.label ||
                    !overlaps(box.x1, box.y1, box.x2, box.y2, candidate.area, other.box.x1, other.box.y1, other.box.x2,
                              other.box.y2, other.area, iou);
          }
          shared.x1[i] = box.x1;
          shared.y1[i] = box.y1;
          shared.x2[i] = box.x2;
          shared.y2[i] = box.y2;
          shared.area[i] = candidate.area;
          shared.label[i] = candidate.label;
          shared.alive[i] = alive;
        }
      });
      resolve<S>(block, shared, size, iou);
      block.phase([&](int t) {
        for (int i = t; i < size; i += block.threads()) {
          if (!shared.survives[i]) continue;
          int64_t place = survivors + count_bits(shared.surviving[i / 32] & ((uint32_t{1} << i % 32) - 1));
          for (int word = 0; word < i / 32; ++word) place += count_bits(shared.surviving[word]);
          if (place >= max_det) continue;
          const int chain = chain_of<S>(shared.label[i]);
          kept[place] = {{shared.x1[i], shared.y1[i], shared.x2[i], shared.y2[i]},
                         shared.area[i],
                         exchange(&shared.heads[chain], static_cast<int>(place)),
                         shared.label[i]};
          write(place, shared.keys[first + i]);
        }
      });
      for (int word = 0; word < S::kWords; ++word) survivors += count_bits(shared.surviving[word]);
      if (survivors > max_det) survivors = max_det;
    }
    seen += count;
    bound = least - 1;
  }
  return survivors;
}

}  // namespace yolov9_fast::suppression
