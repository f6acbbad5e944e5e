// The streaming softmax on Hopper: which kernel, how the bank is cut, the launch.
#include "similarity/softmax.cuh"

namespace kdfast {
namespace {

// Of a part of the bank at least; parts at most, but where they are long as many as multiprocessors: to join one takes less than a tile.
constexpr int64_t kLeastTiles = 4, kMostParts = 64, kLongTiles = 16;

template <Element kType, class T>
const char* launch_softmax(const SimilarityForward& call, void* stream) {
  const SimilarityProblem& p = call.problem;
  SoftmaxParams params{};
  params.call = call;
  Streamed& s = params.streamed;
  s.entries = p.batch, s.rows = p.rows, s.columns = p.columns, s.part_columns = call.split.columns;
  s.pass_shared = p.keys_stride == 0, s.values_shared = p.values_stride == 0, s.valid = p.valid, s.valid_stride = p.valid_stride, s.units = call.units, s.blocks = call.blocks;
  const char* error = encode_maps<T>(s, kType, p.width, p.query, p.keys);
  if (T::kValued && error == nullptr) error = encode_values<T>(s, kType, p.value_width, p.values);
  if (error != nullptr) return error;
  const Launch how{call.blocks, kThreads, T::kShared, 1, stream};
  const bool masked = p.masked();
  if constexpr (!T::kValued) {
    if (call.out.pooled == nullptr) return launch(masked ? softmax_kernel<kType, T, false, true> : softmax_kernel<kType, T, false, false>, how, params);
  }
  return launch(masked ? softmax_kernel<kType, T, true, true> : softmax_kernel<kType, T, true, false>, how, params);
}

template <Element kType>
const char* launch_width(const SimilarityForward& p, void* stream) {
  if (p.problem.values != nullptr && p.out.pooled != nullptr) {
    const bool narrow = p.problem.width <= kWidths[0] && p.problem.value_width <= kWidths[0];
    return narrow ? launch_softmax<kType, Tile<kWidths[0], true>>(p, stream) : launch_softmax<kType, Tile<kWidths[1], true>>(p, stream);
  }
  if (p.problem.width <= kWidths[0]) return launch_softmax<kType, Tile<kWidths[0]>>(p, stream);
  if (p.problem.width <= kWidths[1]) return launch_softmax<kType, Tile<kWidths[1]>>(p, stream);
  return launch_softmax<kType, Tile<kWidths[2]>>(p, stream);
}

int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

}  // namespace

bool similarity_serves(int64_t width) { return width > 0 && width % 8 == 0 && width <= kWidths[2]; }

bool similarity_serves(int64_t width, int64_t value_width) {
  return similarity_serves(width) && similarity_serves(value_width) && width <= kWidths[1] && value_width <= kWidths[1];
}

// Blocks stay and take one unit after another, so what counts is how full their last round is: the fewest parts with which 95 % of all
// rounds are, or else those that fill most.
bool similarity_plan(SimilarityForward& p) {
  const int64_t tile = columns_of_tile(p.problem.width), tiles = ceil_div(p.problem.columns, tile), seats = processors();
  const int64_t row_tiles = p.problem.batch * ceil_div(p.problem.rows, kRows);
  const int64_t few = least(tiles / kLeastTiles, kMostParts), many = least(tiles / kLongTiles, seats), most = few > many ? few : many;
  double fullest = 0;
  for (int64_t parts = 1; parts == 1 || (parts <= most && fullest < 0.95); ++parts) {
    const int64_t columns = ceil_div(tiles, parts) * tile;
    const double filled = double(row_tiles * tiles) / double(ceil_div(row_tiles * ceil_div(tiles * tile, columns), seats) * seats * (columns / tile));
    if (filled <= fullest) continue;
    fullest = filled, p.split.parts = ceil_div(tiles * tile, columns), p.split.columns = columns;
  }
  const int64_t units = row_tiles * p.split.parts;
  if (units > INT32_MAX / 2) return false;
  p.units = int(units), p.blocks = int(units < seats ? units : seats);
  return true;
}

const char* similarity_forward(const SimilarityForward& p, void* stream) {
  const char* const error = p.problem.element == Element::kBFloat16 ? launch_width<Element::kBFloat16>(p, stream) : launch_width<Element::kFloat16>(p, stream);
  return error != nullptr || p.split.parts == 1 ? error : similarity_merge(p, stream);
}

}  // namespace kdfast
