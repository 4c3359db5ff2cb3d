// Attention of one token over a cache, on CPUs.
//
// Keys and values are read once, for all query heads that share them, and only where the mask shows
// them. Threads share the positions of a head of keys; what each found is added up at the end. Keys
// and values may be codes of 8 bits, with a scale for each position: a factor of its score, and of
// its weight.
#include "vectors.h"

namespace {

constexpr int64_t kChunk = 64;         // positions between two looks at the largest score
constexpr int64_t kLeastPositions = 64;  // for a thread of its own
constexpr int kWide = 4;               // vectors of a result that are summed at a time

// 2^x for x <= 0, to float32's accuracy: Taylor's series on [-0.5, 0.5].
inline Floats power_of_two(Floats x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  x = x < -126.0f ? Floats{} - 126.0f : x;
  const Floats whole = (x + kShift) - kShift, part = x - whole;
  Floats sum = part * 1.5252734e-5f + 1.5403530e-4f;
  for (float factor : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f})
    sum = sum * part + factor;
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return sum * (Floats)exponent;
}

inline float most_of(Floats x) {
  float most = x[0];
  for (int i = 1; i < kLanes; i++) most = std::max(most, x[i]);
  return most;
}

struct Strides {
  int64_t batch, head, position;
};

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Keys and values of one head, the query heads that share them, and the mask of each of these.
template <class C>
struct Head {
  const float* queries;  // `[group, width]`, times scale and log2(e)
  const C *keys, *values;
  const float *key_scales, *value_scales;  // of codes, else null
  int64_t key_stride, value_stride, width, value_width, group;
  const uint8_t* mask;  // or null
  int64_t mask_head, mask_position;

  bool shown(int64_t query, int64_t position) const {
    return !mask || mask[query * mask_head + position * mask_position];
  }
};

// What a thread found: for each query head the largest score, the sum of 2^(score - largest), and
// the values weighted by it.
struct Found {
  std::vector<float> largest, sums, values;

  Found(int64_t group, int64_t width)
      : largest(group, -INFINITY), sums(group, 0.0f), values(group * width, 0.0f) {}
};

// Add to the scores of a query head what some columns give. What is not shown stays -infinity.
template <int N, class C>
void add_scores(const Head<C>& head, int64_t query, const int64_t* positions, int64_t count,
                int64_t column, float* scores) {
  Floats of_query[N];
  for (int i = 0; i < N; i++)
    of_query[i] = load<Floats>(head.queries + query * head.width + column + i * kLanes);
  for (int64_t p = 0; p < count; p++) {
    const C* key = head.keys + positions[p] * head.key_stride + column;
    Floats products = floats(key) * of_query[0];
    for (int i = 1; i < N; i++) products += floats(key + i * kLanes) * of_query[i];
    scores[p] += sum(products);
  }
}

template <int N, class C>
void add_values(const Head<C>& head, const int64_t* positions, int64_t count, const float* weights,
                int64_t column, float* to) {
  Floats sums[N];
  for (int i = 0; i < N; i++) sums[i] = load<Floats>(to + column + i * kLanes);
  for (int64_t p = 0; p < count; p++) {
    const C* row = head.values + positions[p] * head.value_stride + column;
    for (int i = 0; i < N; i++) sums[i] += floats(row + i * kLanes) * weights[p];
  }
  for (int i = 0; i < N; i++) store(to + column + i * kLanes, sums[i]);
}

// Call `f` with a column and an integral constant of the vectors to take from there.
template <class F>
void by_columns(int64_t width, const F& f) {
  int64_t column = 0;
  for (; column + kWide * kLanes <= width; column += kWide * kLanes)
    f(column, std::integral_constant<int, kWide>());
  for (; column < width; column += kLanes) f(column, std::integral_constant<int, 1>());
}

// Multiply what positions have by their scales, without waking what they do not have.
void scale_by(const float* scales, const int64_t* positions, int64_t count, float nothing,
              float* of) {
  if (!scales) return;
  for (int64_t p = 0; p < count; p++)
    if (of[p] != nothing) of[p] *= scales[positions[p]];
}

template <class C>
void attend_chunk(const Head<C>& head, const int64_t* positions, int64_t count, Found& found) {
  alignas(64) float of[kChunk];
  for (int64_t query = 0; query < head.group; query++) {
    for (int64_t p = 0; p < kChunk; p++)
      of[p] = p < count && head.shown(query, positions[p]) ? 0.0f : -INFINITY;
    by_columns(head.width, [&](int64_t column, auto vectors) {
      add_scores<vectors()>(head, query, positions, count, column, of);
    });
    scale_by(head.key_scales, positions, count, -INFINITY, of);
    const float before = found.largest[query];
    Floats most = Floats{} + before;
    for (int64_t p = 0; p < kChunk; p += kLanes) {
      const Floats next = load<Floats>(of + p);
      most = next > most ? next : most;
    }
    const float largest = most_of(most);
    if (largest == -INFINITY) continue;
    Floats total = {};
    for (int64_t p = 0; p < kChunk; p += kLanes) {
      const Floats weights = power_of_two(load<Floats>(of + p) - largest);
      // A score of -infinity counts nothing at all.
      store(of + p, load<Floats>(of + p) == -INFINITY ? Floats{} : weights);
      total += load<Floats>(of + p);
    }
    const float shrink = before == -INFINITY ? 0.0f : std::exp2(before - largest);
    found.largest[query] = largest;
    found.sums[query] = found.sums[query] * shrink + sum(total);
    scale_by(head.value_scales, positions, count, 0.0f, of);
    float* to = found.values.data() + query * head.value_width;
    for (int64_t i = 0; i < head.value_width; i++) to[i] *= shrink;
    by_columns(head.value_width, [&](int64_t column, auto vectors) {
      add_values<vectors()>(head, positions, count, of, column, to);
    });
  }
}

// Add up what threads found for a query head; zeros if it sees nothing.
template <class T>
void add_up(const std::vector<Found>& all, int64_t query, int64_t width, T* out) {
  float largest = -INFINITY, total = 0.0f;
  for (const Found& found : all) largest = std::max(largest, found.largest[query]);
  std::vector<float> values(width, 0.0f);
  for (const Found& found : all) {
    if (found.largest[query] == -INFINITY) continue;
    const float share = std::exp2(found.largest[query] - largest);
    total += found.sums[query] * share;
    for (int64_t i = 0; i < width; i++) values[i] += found.values[query * width + i] * share;
  }
  for (int64_t i = 0; i < width; i++) store(out + i, total == 0.0f ? 0.0f : values[i] / total);
}

// The positions that a query head of a head of keys sees.
template <class C>
std::vector<int64_t> seen(const Head<C>& head, int64_t length) {
  std::vector<int64_t> positions;
  positions.reserve(length);
  const int64_t heads = head.mask && head.mask_head ? head.group : 1;
  for (int64_t position = 0; position < length; position++)
    for (int64_t query = 0; query < heads; query++)
      if (head.shown(query, position)) {
        positions.push_back(position);
        break;
      }
  return positions;
}

// Keys and values are numbers of type C. `scales` is null, or has those of keys and of values.
template <class T, class C>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* const* scales,
            const std::optional<Tensor>& mask, double scale, T* out) {
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), length = k.size(2);
  const int64_t width = k.size(3), value_width = v.size(3), group = heads / kv_heads;
  const Strides of_q = strides_of(q), of_k = strides_of(k), of_v = strides_of(v);
  const float factor = static_cast<float>(scale * 1.4426950408889634);
  std::vector<float> queries(batch * heads * width);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < width; i++)
        queries[(b * heads + h) * width + i] =
            factor * to_float(data<T>(q)[b * of_q.batch + h * of_q.head + i]);
  std::vector<Head<C>> all;
  std::vector<std::vector<int64_t>> positions;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t first = h * group;
      const int64_t scales_at = (b * kv_heads + h) * length;
      Head<C> head{queries.data() + (b * heads + first) * width,
                   data<C>(k) + b * of_k.batch + h * of_k.head,
                   data<C>(v) + b * of_v.batch + h * of_v.head,
                   scales ? data<float>(*scales[0]) + scales_at : nullptr,
                   scales ? data<float>(*scales[1]) + scales_at : nullptr,
                   of_k.position, of_v.position, width, value_width, group, nullptr, 0, 0};
      if (mask) {
        const int64_t mask_batch = mask->size(0) > 1 ? mask->stride(0) : 0;
        head.mask_head = mask->size(1) > 1 ? mask->stride(1) : 0;
        head.mask_position = mask->stride(3);
        head.mask = data<uint8_t>(*mask) + b * mask_batch + first * head.mask_head;
      }
      all.push_back(head);
      const bool again = h > 0 && head.mask_head == 0;  // the heads of a sequence see the same
      positions.push_back(again ? positions.back() : seen(head, length));
    }
  const int64_t threads = torch::stable::get_num_threads(), pairs = all.size();
  const int64_t enough = std::max<int64_t>(1, length / kLeastPositions);
  const int64_t splits = pairs % threads == 0 ? 1 : std::min(threads, enough);
  std::vector<std::vector<Found>> found(pairs, std::vector<Found>(splits, {group, value_width}));
  torch::stable::parallel_for(0, pairs * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t pair = task / splits, split = task % splits, n = positions[pair].size();
      const int64_t last = n * (split + 1) / splits;
      for (int64_t p = n * split / splits; p < last; p += kChunk)
        attend_chunk(all[pair], positions[pair].data() + p, std::min(kChunk, last - p),
                     found[pair][split]);
    }
  });
  for (int64_t pair = 0; pair < pairs; pair++)
    for (int64_t query = 0; query < group; query++)
      add_up(found[pair], query, value_width, out + (pair * group + query) * value_width);
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask) {
  for (const Tensor& each : {q, k, v})
    STD_TORCH_CHECK(each.dim() == 4 && each.is_cpu() && each.stride(3) == 1,
                    "q, k and v are no heads on the CPU");
  STD_TORCH_CHECK(k.scalar_type() == v.scalar_type(), "k and v have different dtypes");
  STD_TORCH_CHECK(q.size(2) == 1 && q.size(3) == k.size(3) && k.size(3) % kLanes == 0 &&
                      v.size(3) % kLanes == 0 && q.size(0) == k.size(0) && v.size(0) == k.size(0) &&
                      k.size(1) == v.size(1) && k.size(2) == v.size(2) && k.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0,
                  "q, k and v do not fit");
  if (mask)
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_cpu() && mask->dim() == 4 &&
                        (mask->size(0) == 1 || mask->size(0) == q.size(0)) &&
                        (mask->size(1) == 1 || mask->size(1) == q.size(1)) && mask->size(2) == 1 &&
                        mask->size(3) == k.size(2),
                    "the mask does not fit");
}

Tensor empty_like_query(const Tensor& q, const Tensor& v) {
  const std::vector<int64_t> shape{q.size(0), q.size(1), 1, v.size(3)};
  return torch::stable::new_empty(q, shape);
}

Tensor token_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                       const std::optional<Tensor>& mask, double scale) {
  check_heads(q, k, v, mask);
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "q, k and v have different dtypes");
  Tensor out = empty_like_query(q, v);
  of_type(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attend<T, T>(q, k, v, nullptr, mask, scale, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor token_attention_codes(const Tensor& q, const Tensor& k, const Tensor& k_scales,
                             const Tensor& v, const Tensor& v_scales,
                             const std::optional<Tensor>& mask, double scale, bool is_float8) {
  check_heads(q, k, v, mask);
  STD_TORCH_CHECK(k.scalar_type() == ScalarType::Char, "codes are no int8");
  const Tensor* const scales[] = {&k_scales, &v_scales};
  for (const Tensor* each : scales)
    STD_TORCH_CHECK(each->is_contiguous() && each->is_cpu() && each->dim() == 3 &&
                        each->scalar_type() == ScalarType::Float && each->size(0) == k.size(0) &&
                        each->size(1) == k.size(1) && each->size(2) == k.size(2),
                    "the scales do not fit");
  Tensor out = empty_like_query(q, v);
  of_type(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (is_float8)
      attend<T, float8>(q, k, v, scales, mask, scale, to);
    else
      attend<T, int8_t>(q, k, v, scales, mask, scale, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoquant, CPU, library) {
  library.impl("token_attention", TORCH_BOX(&token_attention));
  library.impl("token_attention_codes", TORCH_BOX(&token_attention_codes));
}
