// A fused network of one hidden layer, y = W1 relu(W0 x), in tiles of 16 points: nothing but x, y
// and their gradients passes through memory. Inputs are a multiple of 16 wide, the hidden layer of
// 8; widths up to 64 in, 128 hidden, 16 out; whole tiles only. A candidate that small_mlp.py
// measures, not a back end.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kTile = 16;
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));

Half load(const float* from) { return *reinterpret_cast<const Half*>(from); }
void store(float* to, Half value) { *reinterpret_cast<Half*>(to) = value; }

// out[r][16] (+)= sum over i of left[r * row + i * column] right[i * stride .. + 16].
template <int R>
void rows_times(const float* left, int row, int column, int count, const float* right, int stride,
                float* out, int out_row, bool adds) {
  Half low[R], high[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    low[r] = adds ? load(out + r * out_row) : Half{};
    high[r] = adds ? load(out + r * out_row + 8) : Half{};
  }
  for (int i = 0; i < count; ++i) {
    const Half a = load(right + i * stride), b = load(right + i * stride + 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float factor = left[r * row + i * column];
      low[r] += factor * a;
      high[r] += factor * b;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(out + r * out_row, low[r]);
    store(out + r * out_row + 8, high[r]);
  }
}

// Planar tiles: out[rows][16] = weight[rows][count] in[count][16].
void layer(const float* weight, int rows, int count, const float* in, float* out) {
  int r = 0;
  for (; r + 6 <= rows; r += 6)
    rows_times<6>(weight + r * count, count, 1, count, in, kTile, out + r * kTile, kTile, false);
  for (; r < rows; ++r)
    rows_times<1>(weight + r * count, count, 1, count, in, kTile, out + r * kTile, kTile, false);
}

void to_planar(const float* rows, int width, float* out) {
  for (int k = 0; k < width; ++k)
    for (int p = 0; p < kTile; ++p) out[k * kTile + p] = rows[p * width + k];
}

void to_rows(const float* planar, int width, float* out) {
  for (int p = 0; p < kTile; ++p)
    for (int k = 0; k < width; ++k) out[p * width + k] = planar[k * kTile + p];
}

std::vector<float> transposed(const float* weight, int rows, int columns) {
  std::vector<float> out(static_cast<size_t>(rows) * columns);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[c * rows + r] = weight[r * columns + c];
  return out;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void mlp_forward(
    const float* x, const float* w0, const float* w1, float* y, int64_t n, int32_t n_in,
    int32_t n_hidden, int32_t n_out) {
  float in[64 * kTile], hidden[128 * kTile], out[16 * kTile];
  for (int64_t begin = 0; begin + kTile <= n; begin += kTile) {
    to_planar(x + begin * n_in, n_in, in);
    layer(w0, n_hidden, n_in, in, hidden);
    for (int i = 0; i < n_hidden * kTile; ++i) hidden[i] = std::max(hidden[i], 0.0f);
    layer(w1, n_out, n_hidden, hidden, out);
    to_rows(out, n_out, y + begin * n_out);
  }
}

extern "C" __attribute__((visibility("default"))) void mlp_backward(
    const float* x, const float* w0, const float* w1, const float* grad, float* grad_x,
    float* grad_w0, float* grad_w1, int64_t n, int32_t n_in, int32_t n_hidden, int32_t n_out) {
  float in[64 * kTile], hidden[128 * kTile], out[16 * kTile], back[128 * kTile];
  const auto w0_t = transposed(w0, n_hidden, n_in), w1_t = transposed(w1, n_out, n_hidden);
  std::fill(grad_w0, grad_w0 + n_hidden * n_in, 0.0f);
  std::fill(grad_w1, grad_w1 + n_out * n_hidden, 0.0f);
  for (int64_t begin = 0; begin + kTile <= n; begin += kTile) {
    to_planar(x + begin * n_in, n_in, in);
    to_planar(grad + begin * n_out, n_out, out);
    layer(w0, n_hidden, n_in, in, hidden);
    for (int i = 0; i < n_hidden * kTile; ++i) hidden[i] = std::max(hidden[i], 0.0f);
    layer(w1_t.data(), n_hidden, n_out, out, back);
    for (int i = 0; i < n_hidden * kTile; ++i) back[i] = hidden[i] > 0 ? back[i] : 0.0f;
    for (int j = 0; j < n_out; ++j) {
      for (int i = 0; i < n_hidden; ++i) {
        float sum = 0;
        for (int p = 0; p < kTile; ++p) sum += out[j * kTile + p] * hidden[i * kTile + p];
        grad_w1[j * n_hidden + i] += sum;
      }
    }
    for (int i = 0; i < n_hidden; i += 4) {
      for (int k = 0; k < n_in; k += 16) {
        rows_times<4>(back + i * kTile, kTile, 1, kTile, x + begin * n_in + k, n_in,
                      grad_w0 + i * n_in + k, n_in, true);
      }
    }
    layer(w0_t.data(), n_in, n_hidden, back, in);
    to_rows(in, n_in, grad_x + begin * n_in);
  }
}
