// What the memory system allows: the table accesses of a hash grid without its arithmetic.
//
// Both loops visit the same entries in the same order as the kernel, level by level, from a list of
// indices made beforehand. Entries are pairs of floats, read or updated as one 8-byte value.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

template <typename Body>
void run_parallel(int n_threads, const Body& body) {
  std::vector<std::thread> threads;
  for (int worker = 1; worker < n_threads; ++worker) threads.emplace_back(body, worker);
  body(0);
  for (auto& thread : threads) thread.join();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Points are split over threads; each crosses the levels in order. Returns a sum, so that the loads
// cannot be left out. index [n_levels, n_per_level]; starts [n_levels] first entry of each level.
EXPORT float gather(const uint32_t* index, const uint64_t* starts, const float* table,
                    int32_t n_levels, int64_t n_per_level, int32_t n_threads) {
  std::vector<float> sums(n_threads * 16);
  run_parallel(n_threads, [&](int worker) {
    const int64_t begin = n_per_level * worker / n_threads;
    const int64_t end = n_per_level * (worker + 1) / n_threads;
    float low[4] = {}, high[4] = {};
    for (int level = 0; level < n_levels; ++level) {
      const uint32_t* indices = index + level * n_per_level;
      const float* entries = table + starts[level] * 2;
      for (int64_t i = begin; i + 4 <= end; i += 4) {
        for (int lane = 0; lane < 4; ++lane) {
          float pair[2];
          std::memcpy(pair, entries + static_cast<size_t>(indices[i + lane]) * 2, sizeof pair);
          low[lane] += pair[0];
          high[lane] += pair[1];
        }
      }
    }
    for (int lane = 0; lane < 4; ++lane) sums[worker * 16] += low[lane] + high[lane];
  });
  float sum = 0;
  for (int worker = 0; worker < n_threads; ++worker) sum += sums[worker * 16];
  return sum;
}

// Levels are split over threads, as in the kernel's table gradient.
EXPORT void read_add_write(const uint32_t* index, const uint64_t* starts, float* table,
                           int32_t n_levels, int64_t n_per_level, int32_t n_threads) {
  run_parallel(n_threads, [&](int worker) {
    for (int level = worker; level < n_levels; level += n_threads) {
      const uint32_t* indices = index + level * n_per_level;
      float* entries = table + starts[level] * 2;
      for (int64_t i = 0; i < n_per_level; ++i) {
        float* entry = entries + static_cast<size_t>(indices[i]) * 2;
        entry[0] += 1.0f;
        entry[1] += 1.0f;
      }
    }
  });
}
