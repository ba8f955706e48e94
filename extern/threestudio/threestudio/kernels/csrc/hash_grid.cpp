// Multiresolution grid encoding on the CPU: features of points, and their gradients.
//
// The semantics, the order of the parameters and every table index are those of the PyTorch twin
// (torch_backend.py), which follows tiny-cuda-nn. What is done here for speed:
//  - Work goes level by level: the table of one level (4 MiB at 2^19 entries of 2 floats) stays in
//    the last-level cache, the whole table would not.
//  - Points go in blocks of 64: first the corner indices and weights of the block in vectorised
//    loops, then a loop of independent loads that keeps many cache misses in flight. A block is
//    located one block ahead, and its entries are prefetched while the one before is summed.
//  - Positions and gradients are transposed once, so that a level reads them contiguously.
// Forward and position gradient are split into ranges of points, the table gradient into levels, so
// no two threads write to one place and results do not depend on the number of threads.
//
// Several grids may be summed: they have as many levels and features, and each reads the leading
// coordinates of the points. Planar copies are then made once, and the sum needs no memory.
//
// One build serves one case, so that it takes a second: GRID_REAL (float or double), GRID_DIMS (of
// the points, 2 to 4) and GRID_FEATURES (per level) are given by the compiler's command line. Where
// GRID_SUM is 1 it also serves grids of one dimension less than the points.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int kBlock = 64;
// Below this a thread costs more than it saves.
constexpr int64_t kMinPointsPerThread = 1024;
// Arrays of so many bytes are mappings of their own for glibc's malloc, whatever it has learned.
constexpr size_t kOwnMapping = size_t{32} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
// Grid coordinates saturate here, so that cells fit 32 bits.
constexpr double kCoordinateLimit = 1073741824.0;
// The first prime is 1: neighbours along the first axis stay neighbours in memory.
constexpr uint32_t kPrimes[4] = {1u, 2654435761u, 805459861u, 3674653429u};

enum Status { kOk = 0, kOutOfMemory = 1, kUnsupported = 2, kFailed = 3 };

}  // namespace

extern "C" struct GridLayout {
  int32_t n_input_dims;
  int32_t n_features;
  int32_t n_levels;
  const double* scales;
  const uint32_t* resolutions;
  const uint32_t* entries;  // per level
  const uint64_t* offsets;  // first entry of each level
};

namespace {

// A published table's gradient is 50 MiB of new memory in every step, features of many points as
// much, and the faults on its 4 KiB pages cost more than what is computed. A hint: where it is
// refused, nothing changes.
void ask_for_huge_pages(void* array, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kOwnMapping) return;
  const auto begin = (reinterpret_cast<uintptr_t>(array) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(array) + bytes) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

struct Level {
  double scale;
  uint32_t resolution;
  uint32_t entries;
  uint64_t offset;
  bool hashed;
};

Level level_of(const GridLayout& grid, int level) {
  Level result{grid.scales[level], grid.resolutions[level], grid.entries[level],
               grid.offsets[level], false};
  uint64_t vertices = 1;
  for (int dim = 0; dim < grid.n_input_dims && vertices <= result.entries; ++dim) {
    vertices *= result.resolution;
  }
  result.hashed = vertices > result.entries;
  return result;
}

// Runs task(worker) for worker = 0 .. n_workers - 1, each on a thread of its own where the system
// grants one, otherwise one after another: tasks must not wait for each other.
template <typename Task>
void run_parallel(int n_workers, const Task& task) {
  std::vector<std::thread> threads;
  threads.reserve(n_workers);
  int started = 1;
  try {
    for (; started < n_workers; ++started) threads.emplace_back(task, started);
  } catch (const std::exception&) {
    // No more threads to be had; the rest runs below.
  }
  task(0);
  for (int worker = started; worker < n_workers; ++worker) task(worker);
  for (auto& thread : threads) thread.join();
}

// Points split into one range per worker, in whole blocks.
struct Split {
  int n_workers;
  int64_t n_points;
  int64_t blocks_per_worker;

  Split(int64_t n, int n_threads) : n_points(n) {
    const int64_t n_blocks = (n + kBlock - 1) / kBlock;
    const int64_t useful = std::max<int64_t>(n / kMinPointsPerThread, 1);
    n_workers = static_cast<int>(std::min<int64_t>(std::max(n_threads, 1), useful));
    blocks_per_worker = (n_blocks + n_workers - 1) / n_workers;
  }
  int64_t begin(int worker) const {
    return std::min(worker * blocks_per_worker * kBlock, padded());
  }
  int64_t end(int worker) const { return begin(worker + 1); }
  // Rounded up to whole blocks: scratch rows have this length.
  int64_t padded() const { return (n_points + kBlock - 1) / kBlock * kBlock; }
};

template <typename T>
std::unique_ptr<T[]> scratch(int64_t n) {
  std::unique_ptr<T[]> array(new T[static_cast<size_t>(n)]);
  ask_for_huge_pages(array.get(), static_cast<size_t>(n) * sizeof(T));
  return array;
}

// Corner indices and weights of one block of points at one level.
template <typename T, int D>
struct Corners {
  static constexpr int kCount = 1 << D;

  uint32_t index[kCount][kBlock];
  T weight[kCount][kBlock];
  T fraction[D][kBlock];
  // Derivative of the grid coordinate: the level's scale, 0 where the coordinate saturates.
  T slope[D][kBlock];

  // x: planar positions, D rows of length `stride`, starting at this block.
  void locate(const T* x, int64_t stride, const Level& level) {
    uint32_t along[D][2][kBlock];
    uint32_t factor = 1;
    for (int dim = 0; dim < D; ++dim) {
      place(x + dim * stride, dim, level, level.hashed ? kPrimes[dim] : factor, along[dim]);
      factor *= level.resolution;
    }
    if (level.hashed) {
      combine<true>(along, level.entries);
    } else {
      combine<false>(along, level.entries);
    }
  }

  // Asks for the entries of one point, so that they are near when its block's turn comes.
  template <int F>
  void prefetch(const T* entries, int i) const {
    for (int corner = 0; corner < kCount; ++corner) {
      __builtin_prefetch(entries + static_cast<size_t>(index[corner][i]) * F);
    }
  }

  void weigh() {
    for (int i = 0; i < kBlock; ++i) weight[0][i] = T(1);
    for (int dim = 0; dim < D; ++dim) {
      for (int corner = 0; corner < (1 << dim); ++corner) {
        T* low = weight[corner];
        T* high = weight[corner + (1 << dim)];
        for (int i = 0; i < kBlock; ++i) {
          const T upper = low[i] * fraction[dim][i];
          low[i] = low[i] - upper;
          high[i] = upper;
        }
      }
    }
  }

 private:
  void place(const T* x, int dim, const Level& level, uint32_t factor,
             uint32_t (&along)[2][kBlock]) {
    const T scale = static_cast<T>(level.scale);
    const T limit = static_cast<T>(kCoordinateLimit);
    for (int i = 0; i < kBlock; ++i) {
      // Selections alone, which the compiler vectorises (with -fno-trapping-math): point by point
      // this loop took as long as the gathers.
      const T given = x[i] * scale + T(0.5);
      const T above = given < -limit ? -limit : given;
      const T position = above > limit ? limit : above;
      slope[dim][i] = position == given ? scale : T(0);
      // A NaN lies in cell 0 and keeps its NaN weights: features say so, indices stay safe.
      const T number = position == position ? position : T(0);
      const int32_t towards_zero = static_cast<int32_t>(number);
      const int32_t cell = towards_zero - (number < static_cast<T>(towards_zero) ? 1 : 0);
      fraction[dim][i] = position - static_cast<T>(cell);
      const uint32_t low = static_cast<uint32_t>(cell) * factor;
      along[0][i] = low;
      along[1][i] = low + factor;
    }
  }

  template <bool kHashed>
  void combine(const uint32_t (&along)[D][2][kBlock], uint32_t entries) {
    const uint32_t mask = entries - 1;
    for (int corner = 0; corner < kCount; ++corner) {
      uint32_t* out = index[corner];
      for (int i = 0; i < kBlock; ++i) {
        uint32_t key = along[0][corner & 1][i];
        for (int dim = 1; dim < D; ++dim) {
          const uint32_t next = along[dim][(corner >> dim) & 1][i];
          key = kHashed ? key ^ next : key + next;
        }
        out[i] = kHashed ? key & mask : key;  // hashed levels have a power of two of entries
      }
      if (!kHashed) wrap(out, entries);
    }
  }

  // Dense indices run past the level at and beyond its upper border; tiny-cuda-nn wraps them.
  static void wrap(uint32_t* out, uint32_t entries) {
    uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) largest = std::max(largest, out[i]);
    if (largest < entries) return;
    for (int i = 0; i < kBlock; ++i) {
      if (out[i] >= entries) out[i] %= entries;
    }
  }
};

// Calls visit(block, next, begin) for each block of a range of points. `next` is the block after,
// already located, so that its entries can be prefetched; the last block is its own.
template <typename Block, typename T, typename Visit>
void walk(int64_t first, int64_t end, const T* points, int64_t stride, const Level& level,
          const Visit& visit) {
  if (first >= end) return;
  Block blocks[2];
  Block* block = &blocks[0];
  Block* next = &blocks[1];
  block->locate(points + first, stride, level);
  for (int64_t begin = first; begin < end; begin += kBlock) {
    if (begin + kBlock < end) {
      next->locate(points + begin + kBlock, stride, level);
    } else {
      next = block;
    }
    visit(*block, *next, begin);
    std::swap(block, next);
  }
}

// Rows [n, D] to planar [D, padded]; the padding is zero. One worker's range.
template <typename T>
void to_planar(const T* rows, T* planar, int width, const Split& split, int worker) {
  const int64_t stride = split.padded();
  for (int64_t begin = split.begin(worker); begin < split.end(worker); begin += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, split.n_points - begin);
    for (int column = 0; column < width; ++column) {
      T* out = planar + column * stride + begin;
      for (int64_t i = 0; i < count; ++i) out[i] = rows[(begin + i) * width + column];
      for (int64_t i = count; i < kBlock; ++i) out[i] = T(0);
    }
  }
}

// Rows [n, L, F] to or from level-major [L, padded, F]. One worker's range.
template <typename T, int F, bool kToRows>
void swap_levels(std::conditional_t<kToRows, T, const T>* rows,
                 std::conditional_t<kToRows, const T, T>* planar, int n_levels,
                 const Split& split, int worker) {
  const int64_t stride = split.padded() * F;
  for (int64_t begin = split.begin(worker); begin < split.end(worker); begin += kBlock) {
    const int64_t end = std::min<int64_t>(begin + kBlock, split.n_points);
    for (int level = 0; level < n_levels; ++level) {
      for (int64_t point = begin; point < end; ++point) {
        for (int f = 0; f < F; ++f) {
          auto& row = rows[(point * n_levels + level) * F + f];
          auto& entry = planar[level * stride + point * F + f];
          if constexpr (kToRows) {
            row = entry;
          } else {
            entry = row;
          }
        }
      }
    }
  }
}

// What is done to one level of one grid of D dimensions. Points may have more: theirs are the first.
template <typename T, int D, int F>
struct Kernel {
  using Block = Corners<T, D>;

  // Writes the features of a worker's points, or adds them to those that are there.
  template <bool kAdds>
  static void forward_level(const Level& level, const T* points, const T* table, T* features,
                            const Split& split, int worker) {
    const T* entries = table + level.offset * F;
    const auto visit = [&](Block& block, const Block& next, int64_t begin) {
      block.weigh();
      T* out = features + begin * F;
      for (int i = 0; i < kBlock; ++i) {
        next.template prefetch<F>(entries, i);
        T sum[F] = {};
        for (int corner = 0; corner < Block::kCount; ++corner) {
          const T* entry = entries + static_cast<size_t>(block.index[corner][i]) * F;
          for (int f = 0; f < F; ++f) sum[f] += block.weight[corner][i] * entry[f];
        }
        for (int f = 0; f < F; ++f) out[i * F + f] = kAdds ? out[i * F + f] + sum[f] : sum[f];
      }
    };
    walk<Block>(split.begin(worker), split.end(worker), points, split.padded(), level, visit);
  }

  static void table_gradient(const Level& level, const T* points, const T* grads, T* grad_table,
                             const Split& split) {
    T* entries = grad_table + level.offset * F;
    std::fill(entries, entries + static_cast<size_t>(level.entries) * F, T(0));
    const auto visit = [&](Block& block, const Block& next, int64_t begin) {
      block.weigh();
      const int count = static_cast<int>(std::min<int64_t>(kBlock, split.n_points - begin));
      for (int i = 0; i < count; ++i) {
        next.template prefetch<F>(entries, i);
        T grad[F];
        for (int f = 0; f < F; ++f) grad[f] = grads[(begin + i) * F + f];
        for (int corner = 0; corner < Block::kCount; ++corner) {
          T* entry = entries + static_cast<size_t>(block.index[corner][i]) * F;
          for (int f = 0; f < F; ++f) entry[f] += block.weight[corner][i] * grad[f];
        }
      }
    };
    walk<Block>(0, split.padded(), points, split.padded(), level, visit);
  }

  // Adds to the planar gradients of a worker's points.
  static void position_gradient(const Level& level, const T* points, const T* table,
                                const T* grads, T* planar, const Split& split, int worker) {
    const T* entries = table + level.offset * F;
    const auto visit = [&](Block& block, const Block& next, int64_t begin) {
      project(block, next, entries, grads + begin * F, split.n_points - begin);
      contract(block, planar + begin, split.padded());
    };
    walk<Block>(split.begin(worker), split.end(worker), points, split.padded(), level, visit);
  }

 private:
  // Puts the inner product of each corner's features with the incoming gradient in `weight`.
  static void project(Block& block, const Block& next, const T* entries, const T* grads,
                      int64_t n_left) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n_left));
    for (int i = 0; i < count; ++i) {
      next.template prefetch<F>(entries, i);
      for (int corner = 0; corner < Block::kCount; ++corner) {
        const T* entry = entries + static_cast<size_t>(block.index[corner][i]) * F;
        T sum = 0;
        for (int f = 0; f < F; ++f) sum += entry[f] * grads[i * F + f];
        block.weight[corner][i] = sum;
      }
    }
    for (int corner = 0; corner < Block::kCount; ++corner) {
      for (int i = count; i < kBlock; ++i) block.weight[corner][i] = T(0);
    }
  }

  // Adds the gradient to the positions of one block. The corner values are interpolated along one
  // axis after another, from the last to the first, together with the partial derivatives found.
  static void contract(Block& block, T* planar, int64_t stride) {
    T partial[D][Block::kCount / 2][kBlock];
    for (int axis = D - 1; axis >= 0; --axis) {
      const int half = 1 << axis;
      const T* fraction = block.fraction[axis];
      for (int corner = 0; corner < half; ++corner) {
        T* low = block.weight[corner];
        const T* high = block.weight[corner + half];
        for (int i = 0; i < kBlock; ++i) {
          const T difference = high[i] - low[i];
          partial[axis][corner][i] = difference;
          low[i] += fraction[i] * difference;
        }
        for (int other = axis + 1; other < D; ++other) {
          T* left = partial[other][corner];
          const T* right = partial[other][corner + half];
          for (int i = 0; i < kBlock; ++i) left[i] += fraction[i] * (right[i] - left[i]);
        }
      }
    }
    for (int dim = 0; dim < D; ++dim) {
      for (int i = 0; i < kBlock; ++i) {
        planar[dim * stride + i] += block.slope[dim][i] * partial[dim][0][i];
      }
    }
  }
};

// No C++ exception may cross the C interface.
template <typename Call>
int guarded(const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::exception&) {
    return kFailed;
  }
}

constexpr int kDims = GRID_DIMS;
constexpr int kFeatures = GRID_FEATURES;
constexpr int kLeastDims = GRID_SUM ? kDims - 1 : kDims;
using Real = GRID_REAL;

// Calls visit(kernel) with the kernel of a grid's number of dimensions.
template <typename Visit>
void with_kernel(const GridLayout& grid, const Visit& visit) {
  if (grid.n_input_dims == kDims) {
    visit(Kernel<Real, kDims, kFeatures>{});
  } else {
    visit(Kernel<Real, kLeastDims, kFeatures>{});
  }
}

// The grids of a call; `tables` and `grad_tables` have as many places.
struct Grids {
  const GridLayout* const* layouts;
  int count;

  int n_levels() const { return layouts[0]->n_levels; }
  bool are_of_this_build() const {
    for (int i = 0; i < count; ++i) {
      const GridLayout& grid = *layouts[i];
      if (grid.n_input_dims < kLeastDims || grid.n_input_dims > kDims) return false;
      if (grid.n_features != kFeatures || grid.n_levels != n_levels()) return false;
    }
    return count > 0;
  }
};

size_t table_bytes(const GridLayout& grid) {
  const Level last = level_of(grid, grid.n_levels - 1);
  return (last.offset + last.entries) * kFeatures * sizeof(Real);
}

int forward(const Grids& grids, const Real* x, const Real* const* tables, Real* out, int64_t n,
            int n_threads) {
  const Split split(n, n_threads);
  const int64_t per_level = split.padded() * kFeatures;
  const auto points = scratch<Real>(split.padded() * kDims);
  const auto features = scratch<Real>(per_level * grids.n_levels());
  ask_for_huge_pages(out, static_cast<size_t>(n * kFeatures * grids.n_levels()) * sizeof(Real));
  run_parallel(split.n_workers, [&](int worker) {
    to_planar(x, points.get(), kDims, split, worker);
    for (int index = 0; index < grids.n_levels(); ++index) {
      for (int g = 0; g < grids.count; ++g) {
        with_kernel(*grids.layouts[g], [&](auto kernel) {
          using Of = decltype(kernel);
          const auto run =
              g ? &Of::template forward_level<true> : &Of::template forward_level<false>;
          run(level_of(*grids.layouts[g], index), points.get(), tables[g],
              features.get() + index * per_level, split, worker);
        });
      }
    }
    swap_levels<Real, kFeatures, true>(out, features.get(), grids.n_levels(), split, worker);
  });
  return kOk;
}

// A worker's share of the gradient to the positions.
void position_gradient(const Grids& grids, const Real* points, const Real* const* tables,
                       const Real* grads, Real* planar, Real* grad_x, const Split& split,
                       int worker) {
  const int64_t stride = split.padded();
  const int64_t first = split.begin(worker), end = split.end(worker);
  for (int dim = 0; dim < kDims; ++dim) {
    std::fill(planar + dim * stride + first, planar + dim * stride + end, Real(0));
  }
  for (int g = 0; g < grids.count; ++g) {
    with_kernel(*grids.layouts[g], [&](auto kernel) {
      for (int index = 0; index < grids.n_levels(); ++index) {
        kernel.position_gradient(level_of(*grids.layouts[g], index), points, tables[g],
                                 grads + index * stride * kFeatures, planar, split, worker);
      }
    });
  }
  for (int64_t point = first; point < std::min(end, split.n_points); ++point) {
    for (int dim = 0; dim < kDims; ++dim) {
      grad_x[point * kDims + dim] = planar[dim * stride + point];
    }
  }
}

int backward(const Grids& grids, const Real* x, const Real* const* tables, const Real* grad,
             Real* grad_x, Real* const* grad_tables, int64_t n, int n_threads) {
  const Split split(n, n_threads);
  const int64_t per_level = split.padded() * kFeatures;
  const auto points = scratch<Real>(split.padded() * kDims);
  const auto grads = scratch<Real>(per_level * grids.n_levels());
  const auto point_grads = scratch<Real>(grad_x ? split.padded() * kDims : 0);
  run_parallel(split.n_workers, [&](int worker) {
    to_planar(x, points.get(), kDims, split, worker);
    swap_levels<Real, kFeatures, false>(grad, grads.get(), grids.n_levels(), split, worker);
    if (grad_x) {
      position_gradient(grids, points.get(), tables, grads.get(), point_grads.get(), grad_x, split,
                        worker);
    }
  });
  for (int g = 0; g < grids.count; ++g) {
    if (grad_tables[g]) ask_for_huge_pages(grad_tables[g], table_bytes(*grids.layouts[g]));
  }
  std::atomic<int> next{0};
  const int n_tasks = grids.count * grids.n_levels();
  const int n_workers = split.n_workers > 1 ? std::min(n_threads, n_tasks) : 1;
  run_parallel(n_workers, [&](int) {
    // Of the grids the last has most dimensions and takes longest: it begins.
    for (int task = next++; task < n_tasks; task = next++) {
      const int g = grids.count - 1 - task / grids.n_levels(), index = task % grids.n_levels();
      if (!grad_tables[g]) continue;
      with_kernel(*grids.layouts[g], [&](auto kernel) {
        kernel.table_gradient(level_of(*grids.layouts[g], index), points.get(),
                              grads.get() + index * per_level, grad_tables[g], split);
      });
    }
  });
  return kOk;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// x [n, D], tables [entries, F], out [n, L * F]: all row-major. Returns a Status.
EXPORT int hash_grid_forward(const GridLayout* const* layouts, int32_t n_grids, const GRID_REAL* x,
                             const GRID_REAL* const* tables, GRID_REAL* out, int64_t n,
                             int32_t n_threads) {
  const Grids grids{layouts, n_grids};
  if (!grids.are_of_this_build()) return kUnsupported;
  return guarded([&] { return forward(grids, x, tables, out, n, n_threads); });
}

// Gradients are overwritten, not added to; any may be null.
EXPORT int hash_grid_backward(const GridLayout* const* layouts, int32_t n_grids,
                              const GRID_REAL* x, const GRID_REAL* const* tables,
                              const GRID_REAL* grad, GRID_REAL* grad_x,
                              GRID_REAL* const* grad_tables, int64_t n, int32_t n_threads) {
  const Grids grids{layouts, n_grids};
  if (!grids.are_of_this_build()) return kUnsupported;
  return guarded(
      [&] { return backward(grids, x, tables, grad, grad_x, grad_tables, n, n_threads); });
}
