// MHLA of short rows, Eq. 5 with its N x N matrix, and its gradients, one head of one sample at a time.
//
//     P = m[b(i), b(j)] * (q k^T)      n = rows of P summed + eps      o = P v / n
//
// A head's scores stay in the processor's nearest caches: torch's own operations would carry them through
// memory between one another. The backward computes the scores again. Float32 throughout.
//
// Every sum has one order, whatever the processor's vectors and the number of threads: results repeat bit
// for bit on all processors that multiply and add in one instruction.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;  // floats of a vector
constexpr int COLUMNS = 4;     // vectors of a tile: with ROWS = 6, 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
constexpr int COLUMNS = 2;  // 12 of 16 registers
#else
constexpr int64_t LANES = 4;
constexpr int COLUMNS = 2;
#endif
constexpr int ROWS = 6;
constexpr int64_t WIDTH = 16;  // tokens and channels are filled up to a multiple; sums over them have as many parts
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
constexpr int64_t CHUNK = 1 << 14;  // scores computed at once (64 KiB)

int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

Lanes& lanes(float* x) { return *reinterpret_cast<Lanes*>(x); }
const Lanes& lanes(const float* x) { return *reinterpret_cast<const Lanes*>(x); }

// One head of one sample of (batch, tokens, heads, channels), channels side by side.
struct Head {
  const float* start;
  int64_t stride;  // from token to token

  const float* token(int64_t i) const { return start + i * stride; }
};

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Asks torch for the strides once: every question is a call.
struct Heads {
  const float* start;
  int64_t by_sample, by_token, by_head;

  explicit Heads(const Tensor& x)
      : start(static_cast<const float*>(x.const_data_ptr())),
        by_sample(x.stride(0)), by_token(x.stride(1)), by_head(x.stride(2)) {}

  Head at(int64_t sample, int64_t head) const {
    return {start + sample * by_sample + head * by_head, by_token};
  }
};

// A matrix whose element (i, k) lies at start + i * row + k * column.
struct Left {
  const float* start;
  int64_t row, column;
};

template <int R, int C, bool ADD>
void tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  Lanes sums[R][C];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < C; w++) sums[r][w] = ADD ? lanes(c + r * c_row + w * LANES) : Lanes{};
  for (int64_t k = 0; k < depth; k++) {
    Lanes right[C];
    for (int w = 0; w < C; w++) right[w] = lanes(b + k * b_row + w * LANES);
    for (int r = 0; r < R; r++) {
      const float left = a.start[r * a.row + k * a.column];
      for (int w = 0; w < C; w++) sums[r][w] += left * right[w];
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < C; w++) lanes(c + r * c_row + w * LANES) = sums[r][w];
}

template <int C, bool ADD>
void panel(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  for (; rows >= ROWS; rows -= ROWS, a.start += ROWS * a.row, c += ROWS * c_row)
    tile<ROWS, C, ADD>(a, b, b_row, c, c_row, depth);
  switch (rows) {
    case 5: return tile<5, C, ADD>(a, b, b_row, c, c_row, depth);
    case 4: return tile<4, C, ADD>(a, b, b_row, c, c_row, depth);
    case 3: return tile<3, C, ADD>(a, b, b_row, c, c_row, depth);
    case 2: return tile<2, C, ADD>(a, b, b_row, c, c_row, depth);
    case 1: return tile<1, C, ADD>(a, b, b_row, c, c_row, depth);
  }
}

// c (rows, columns) = a (rows, depth) b (depth, columns), or added to c. `columns` is a multiple of WIDTH.
template <bool ADD>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t done = 0;
  for (; columns - done >= COLUMNS * LANES; done += COLUMNS * LANES)
    panel<COLUMNS, ADD>(rows, a, b + done, b_row, c + done, c_row, depth);
  for (; done < columns; done += LANES) panel<1, ADD>(rows, a, b + done, b_row, c + done, c_row, depth);
}

void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  multiply<false>(rows, columns, depth, a, b, b_row, c, c_row);
}

void product(
    bool add, int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c,
    int64_t c_row) {
  if (add) return multiply<true>(rows, columns, depth, a, b, b_row, c, c_row);
  multiply<false>(rows, columns, depth, a, b, b_row, c, c_row);
}

float feature(float x, float offset) { return (x < 0 ? 0 : x) + offset; }  // a NaN stays one

// Features of some tokens as rows of `width`, filled up with zeros.
void features(Head x, int64_t first, int64_t count, int64_t dim, float offset, float* to, int64_t width) {
  for (int64_t i = 0; i < count; i++, to += width) {
    const float* from = x.token(first + i);
    for (int64_t d = 0; d < dim; d++) to[d] = feature(from[d], offset);
    std::fill(to + dim, to + width, 0.0f);
  }
}

void rows_of(Head x, int64_t tokens, int64_t dim, float* to, int64_t width) {
  for (int64_t i = 0; i < tokens; i++, to += width) {
    std::memcpy(to, x.token(i), dim * sizeof(float));
    std::fill(to + dim, to + width, 0.0f);
  }
}

typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(sizeof(float)), may_alias));

// 4 x 4 elements, by halves of pairs of rows.
void transpose_four(const float* from, int64_t row, float* to, int64_t to_row) {
  Four x[4];
  for (int i = 0; i < 4; i++) x[i] = *reinterpret_cast<const Four*>(from + i * row);
  const Four a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + to_row) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to + 2 * to_row) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + 3 * to_row) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// (tokens, dim) as (dim, width), filled up with zeros.
void transpose(Head x, int64_t tokens, int64_t dim, float* to, int64_t width) {
  const int64_t whole_tokens = tokens / 4 * 4, whole = dim / 4 * 4;
  for (int64_t i = 0; i < whole_tokens; i += 4)
    for (int64_t d = 0; d < whole; d += 4) transpose_four(x.token(i) + d, x.stride, to + d * width + i, width);
  for (int64_t i = 0; i < tokens; i++)
    for (int64_t d = i < whole_tokens ? whole : 0; d < dim; d++) to[d * width + i] = x.token(i)[d];
  for (int64_t d = 0; d < dim; d++) std::fill(to + d * width + tokens, to + (d + 1) * width, 0.0f);
}

// A sum in WIDTH parts, so that its order is the same with vectors of any length.
struct Sum {
  Lanes parts[WIDTH / LANES] = {};

  void add_product(const float* x, const float* y) {
    for (int64_t p = 0; p < WIDTH / LANES; p++) parts[p] += lanes(x + p * LANES) * lanes(y + p * LANES);
  }

  float total() const {
    float sums[WIDTH];
    std::memcpy(sums, parts, sizeof(sums));
    for (int64_t half = WIDTH / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
  }
};

float dot(const float* x, const float* y, int64_t count) {
  Sum sum;
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) sum.add_product(x + i, y + i);
  float rest = sum.total();
  for (; i < count; i++) rest += x[i] * y[i];
  return rest;
}

struct Sizes {
  int64_t batch, tokens, heads, dim, dim_v, blocks;
  int64_t width, width_k, width_v;  // tokens and channels, filled up
  int64_t rows;                     // queries of a chunk
  const int64_t* block;             // of every token
  float offset;
  bool normalize;

  Sizes(const Tensor& q, const Tensor& v, const Tensor& mixing, const Tensor& block_of, double offset, bool normalize)
      : batch(q.size(0)), tokens(q.size(1)), heads(q.size(2)), dim(q.size(3)), dim_v(v.size(3)),
        blocks(mixing.size(-1)), width(padded(tokens)), width_k(padded(dim)), width_v(padded(dim_v)),
        rows(std::min(tokens, std::max<int64_t>(CHUNK / width / ROWS, 1) * ROWS)),
        block(static_cast<const int64_t*>(block_of.const_data_ptr())), offset(offset), normalize(normalize) {}

  Tensor tokens_like(const Tensor& x, int64_t channels) const {
    return torch::stable::new_empty(x, {batch, tokens, heads, channels});
  }
};

// The mixing matrices: m[a, b(j)] of one head, a row of weights for every block of queries.
struct Mixing {
  const float* start;
  int64_t by_head;

  Mixing(const Tensor& m, int64_t blocks)
      : start(static_cast<const float*>(m.const_data_ptr())), by_head(m.dim() == 3 ? blocks * blocks : 0) {}

  void spread(const Sizes& s, int64_t head, float* to) const {
    const float* m = start + head * by_head;
    for (int64_t a = 0; a < s.blocks; a++, m += s.blocks, to += s.width) {
      for (int64_t j = 0; j < s.tokens; j++) to[j] = m[s.block[j]];
      std::fill(to + s.tokens, to + s.width, 0.0f);
    }
  }
};

// Memory of one thread, handed out piece by piece. Threads keep theirs from call to call.
class Room {
 public:
  explicit Room(int64_t floats) {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t held = 0;
    if (held < floats) {
      memory.reset(new float[floats + WIDTH]);
      held = floats;
    }
    const auto past = reinterpret_cast<std::uintptr_t>(memory.get()) % 64;  // bytes of a cache line
    next_ = memory.get() + (64 - past) % 64 / sizeof(float);
  }

  float* take(int64_t rows, int64_t columns) {
    float* piece = next_;
    next_ += rows * columns;
    return piece;
  }

 private:
  float* next_;
};

// Rows of a result: written in place where they need no filling up, else beside it first.
struct Rows {
  float *start, *place;
  int64_t row, place_row;

  Rows(float* start, int64_t row, int64_t channels, float* beside, int64_t width)
      : start(start), place(channels == width ? start : beside), row(row), place_row(channels == width ? row : width) {}
};

struct Forward {
  const Sizes s;
  const Heads q, k, v;
  const Mixing mixing;
  const float eps;
  float *out, *sums;

  void heads(int64_t first, int64_t last) const {
    Room room(s.tokens * (s.width_k + s.width_v) + s.dim * s.width + s.blocks * s.width +
              s.rows * (s.width_k + s.width + s.width_v));
    float* keys = room.take(s.tokens, s.width_k);
    float* keys_t = room.take(s.dim, s.width);
    float* values = room.take(s.tokens, s.width_v);
    float* weights = room.take(s.blocks, s.width);
    float* queries = room.take(s.rows, s.width_k);
    float* scores = room.take(s.rows, s.width);
    float* beside = room.take(s.rows, s.width_v);
    for (int64_t task = first; task < last; task++) {
      const int64_t sample = task / s.heads, head = task % s.heads;
      features(k.at(sample, head), 0, s.tokens, s.dim, s.offset, keys, s.width_k);
      transpose({keys, s.width_k}, s.tokens, s.dim, keys_t, s.width);
      rows_of(v.at(sample, head), s.tokens, s.dim_v, values, s.width_v);
      mixing.spread(s, head, weights);
      for (int64_t start = 0; start < s.tokens; start += s.rows) {
        const int64_t count = std::min(s.rows, s.tokens - start);
        features(q.at(sample, head), start, count, s.dim, s.offset, queries, s.width_k);
        product(count, s.width, s.dim, {queries, s.width_k, 1}, keys_t, s.width, scores, s.width);
        float* n = s.normalize ? sums + task * s.tokens + start : nullptr;
        mix(start, count, weights, scores, n);
        float* to = out + ((sample * s.tokens + start) * s.heads + head) * s.dim_v;
        const Rows o(to, s.heads * s.dim_v, s.dim_v, beside, s.width_v);
        product(count, s.width_v, s.tokens, {scores, s.width, 1}, values, s.width_v, o.place, o.place_row);
        for (int64_t i = 0; i < count; i++) {
          const float scale = s.normalize ? 1 / n[i] : 1.0f;
          for (int64_t d = 0; d < s.dim_v; d++) o.start[i * o.row + d] = o.place[i * o.place_row + d] * scale;
        }
      }
    }
  }

  // Turns scores of a chunk into P, and writes n.
  void mix(int64_t start, int64_t count, const float* weights, float* scores, float* n) const {
    for (int64_t i = 0; i < count; i++, scores += s.width) {
      const float* m = weights + s.block[start + i] * s.width;
      Sum sum;
      for (int64_t j = 0; j < s.width; j += WIDTH) sum.add_product(scores + j, m + j);
      for (int64_t j = 0; j < s.width; j += LANES) lanes(scores + j) *= lanes(m + j);
      if (n != nullptr) n[i] = sum.total() + eps;
    }
  }
};

struct Backward {
  const Sizes s;
  const Heads grad, q, k, v, out;
  const Mixing mixing;
  const float* sums;
  float *grad_q, *grad_k, *grad_v, *grad_m;

  // Of one head of one sample.
  struct Pieces {
    float *keys, *keys_t, *values_t, *d_keys, *d_values, *weights, *d_weights;
    float *queries, *d_queries, *g, *scores, *d_scores, *shift;

    explicit Pieces(const Sizes& s) {
      Room room(s.tokens * (2 * s.width_k + s.width_v) + (s.dim + s.dim_v) * s.width + 2 * s.blocks * s.width +
                s.rows * (2 * s.width_k + s.width_v + 2 * s.width + 1));
      keys = room.take(s.tokens, s.width_k);
      keys_t = room.take(s.dim, s.width);
      values_t = room.take(s.dim_v, s.width);
      d_keys = room.take(s.tokens, s.width_k);
      d_values = room.take(s.tokens, s.width_v);
      weights = room.take(s.blocks, s.width);
      d_weights = room.take(s.blocks, s.width);
      queries = room.take(s.rows, s.width_k);
      d_queries = room.take(s.rows, s.width_k);
      g = room.take(s.rows, s.width_v);
      scores = room.take(s.rows, s.width);
      d_scores = room.take(s.rows, s.width);
      shift = room.take(s.rows, 1);
    }
  };

  void heads(int64_t first, int64_t last) const {
    const Pieces p(s);
    for (int64_t task = first; task < last; task++) {
      const int64_t sample = task / s.heads, head = task % s.heads;
      features(k.at(sample, head), 0, s.tokens, s.dim, s.offset, p.keys, s.width_k);
      transpose({p.keys, s.width_k}, s.tokens, s.dim, p.keys_t, s.width);
      transpose(v.at(sample, head), s.tokens, s.dim_v, p.values_t, s.width);
      mixing.spread(s, head, p.weights);
      std::fill(p.d_weights, p.d_weights + s.blocks * s.width, 0.0f);
      const Rows d_k(place(grad_k, sample, 0, head, s.dim), s.heads * s.dim, s.dim, p.d_keys, s.width_k);
      const Rows d_v(place(grad_v, sample, 0, head, s.dim_v), s.heads * s.dim_v, s.dim_v, p.d_values, s.width_v);
      for (int64_t start = 0; start < s.tokens; start += s.rows)
        chunk(p, sample, head, start, std::min(s.rows, s.tokens - start), d_k, d_v);
      for (int64_t j = 0; j < s.tokens; j++) {
        positive(p.keys + j * s.width_k, d_k.place + j * d_k.place_row, d_k.start + j * d_k.row);
        if (d_v.place != d_v.start)
          std::memcpy(d_v.start + j * d_v.row, d_v.place + j * d_v.place_row, s.dim_v * sizeof(float));
      }
      float* d_m = grad_m + task * s.blocks * s.blocks;
      for (int64_t j = 0; j < s.tokens; j++)
        for (int64_t a = 0; a < s.blocks; a++) d_m[a * s.blocks + s.block[j]] += p.d_weights[a * s.width + j];
    }
  }

  // Some queries: all of their gradients, and their parts of those of keys, values and weights.
  void chunk(
      const Pieces& p, int64_t sample, int64_t head, int64_t start, int64_t count, const Rows& d_k,
      const Rows& d_v) const {
    features(q.at(sample, head), start, count, s.dim, s.offset, p.queries, s.width_k);
    product(count, s.width, s.dim, {p.queries, s.width_k, 1}, p.keys_t, s.width, p.scores, s.width);
    outputs(p, sample, head, start, count);
    for (int64_t i = 0; i < count; i++) {
      const float* m = p.weights + s.block[start + i] * s.width;
      for (int64_t j = 0; j < s.width; j += LANES)
        lanes(p.d_scores + i * s.width + j) = lanes(p.scores + i * s.width + j) * lanes(m + j);
    }
    const Left to_keys{p.d_scores, 1, s.width};  // transposed: P first, and the gradient of the scores then
    product(start > 0, s.tokens, s.width_v, count, to_keys, p.g, s.width_v, d_v.place, d_v.place_row);
    product(count, s.width, s.dim_v, {p.g, s.width_v, 1}, p.values_t, s.width, p.d_scores, s.width);
    for (int64_t i = 0; i < count; i++) {
      const float* m = p.weights + s.block[start + i] * s.width;
      float* d_m = p.d_weights + s.block[start + i] * s.width;
      const float* x = p.scores + i * s.width;
      float* d_x = p.d_scores + i * s.width;
      for (int64_t j = 0; j < s.width; j += LANES) {
        const Lanes d_p = lanes(d_x + j) - p.shift[i];
        lanes(d_m + j) += d_p * lanes(x + j);
        lanes(d_x + j) = d_p * lanes(m + j);
      }
    }
    float* to = place(grad_q, sample, start, head, s.dim);
    const Rows d_q(to, s.heads * s.dim, s.dim, p.d_queries, s.width_k);
    const Left from_queries{p.d_scores, s.width, 1};
    product(count, s.width_k, s.tokens, from_queries, p.keys, s.width_k, d_q.place, d_q.place_row);
    product(start > 0, s.tokens, s.width_k, count, to_keys, p.queries, s.width_k, d_k.place, d_k.place_row);
    for (int64_t i = 0; i < count; i++)
      positive(p.queries + i * s.width_k, d_q.place + i * d_q.place_row, d_q.start + i * d_q.row);
  }

  // The gradient of P v, and what the normalizer takes from the gradient of every score of a row.
  void outputs(const Pieces& p, int64_t sample, int64_t head, int64_t start, int64_t count) const {
    const Head grads = grad.at(sample, head), outs = out.at(sample, head);
    const float* n = sums + (sample * s.heads + head) * s.tokens + start;
    for (int64_t i = 0; i < count; i++) {
      const float* from = grads.token(start + i);
      const float scale = s.normalize ? 1 / n[i] : 1.0f;
      float* to = p.g + i * s.width_v;
      for (int64_t d = 0; d < s.dim_v; d++) to[d] = from[d] * scale;
      std::fill(to + s.dim_v, to + s.width_v, 0.0f);
      p.shift[i] = s.normalize ? dot(to, outs.token(start + i), s.dim_v) : 0;
    }
  }

  float* place(float* x, int64_t sample, int64_t token, int64_t head, int64_t channels) const {
    return x + ((sample * s.tokens + token) * s.heads + head) * channels;
  }

  // The gradient of relu(x) + offset, from that of a feature.
  void positive(const float* feature, const float* from, float* to) const {
    for (int64_t d = 0; d < s.dim; d++) to[d] = feature[d] <= s.offset ? 0 : from[d];
  }
};

std::tuple<Tensor, Tensor> short_rows(
    Tensor q, Tensor k, Tensor v, Tensor mixing, Tensor block_of, double offset, double eps, bool normalize) {
  const Sizes s(q, v, mixing, block_of, offset, normalize);
  Tensor out = s.tokens_like(q, s.dim_v);
  Tensor sums = torch::stable::new_empty(q, {s.batch, s.heads, normalize ? s.tokens : 0});
  const Forward all{
      s, Heads(q), Heads(k), Heads(v), Mixing(mixing, s.blocks), static_cast<float>(eps), floats(out), floats(sums)};
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t first, int64_t last) { all.heads(first, last); });
  return {out, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> short_rows_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mixing, Tensor block_of, Tensor out, Tensor sums,
    double offset, bool normalize) {
  const Sizes s(q, v, mixing, block_of, offset, normalize);
  Tensor d_q = s.tokens_like(q, s.dim), d_k = s.tokens_like(q, s.dim), d_v = s.tokens_like(q, s.dim_v);
  Tensor d_m = torch::stable::new_zeros(q, {s.batch, s.heads, s.blocks, s.blocks});
  const Backward all{
      s,           Heads(grad), Heads(q),    Heads(k),    Heads(v), Heads(out), Mixing(mixing, s.blocks),
      floats(sums), floats(d_q), floats(d_k), floats(d_v), floats(d_m)};
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t first, int64_t last) { all.heads(first, last); });
  return {d_q, d_k, d_v, d_m};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mhla, m) {
  m.def(
      "short_rows(Tensor q, Tensor k, Tensor v, Tensor mixing, Tensor block_of, float offset, float eps, "
      "bool normalize) -> (Tensor, Tensor)");
  m.def(
      "short_rows_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mixing, Tensor block_of, "
      "Tensor out, Tensor sums, float offset, bool normalize) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mhla, CPU, m) {
  m.impl("short_rows", TORCH_BOX(&short_rows));
  m.impl("short_rows_backward", TORCH_BOX(&short_rows_backward));
}
