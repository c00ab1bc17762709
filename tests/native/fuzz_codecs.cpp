// Feeds random and mutated bytes to everything that reads an encoded piece, in heap blocks of
// exactly its size, so that the sanitizers see any step outside. Compiled once per instruction set:
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
//       -DZPS_TARGET=base tests/native/fuzz_codecs.cpp csrc/codec/encoding.cpp
//   ./a.out ROUNDS SEED
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "codec/encoding.h"
#include "encode.inc.h"
#include "gather.inc.h"

namespace {

using namespace zps;
using namespace zps::ZPS_TARGET;

std::mt19937_64 generator;

std::uint64_t below(std::uint64_t limit) { return generator() % limit; }

/// Exactly n elements on the heap; a vector of size 0 would have no block of its own.
template <class T>
class Exact {
 public:
  explicit Exact(std::uint64_t n) : n_(n), data_(static_cast<T*>(std::malloc(n * sizeof(T)))) {}
  ~Exact() { std::free(data_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  T* data() { return data_; }
  std::uint64_t bytes() const { return n_ * sizeof(T); }

 private:
  std::uint64_t n_;
  T* data_;
};

using Bytes = Exact<std::uint8_t>;

void fill(void* data, std::uint64_t bytes) {
  auto* at = static_cast<std::uint8_t*>(data);
  for (std::uint64_t i = 0; i < bytes; ++i) at[i] = static_cast<std::uint8_t>(generator());
}

/// Floats of every kind: ordinary ones, all bit patterns, many equal, zeros.
void fill_floats(float* data, std::uint64_t n) {
  const std::uint64_t kind = below(4);
  if (kind == 0) return fill(data, 4 * n);
  for (std::uint64_t i = 0; i < n; ++i) {
    const float noise = static_cast<float>(below(2001)) - 1000.0f;
    data[i] = kind == 1 ? noise * 1e-3f : kind == 2 ? (noise < 0 ? -1.0f : 1.0f) : 0.0f;
  }
}

Codec random_codec() {
  Codec codec{};
  codec.kind = static_cast<Kind>(1 + below(9));
  codec.block = 1u << (4 + below(9));
  codec.flags = static_cast<std::uint32_t>(below(16));
  const double ratios[] = {1e-9, 0.001, 0.01, 0.3, 1.0};
  codec.ratio = ratios[below(5)];
  return codec;
}

std::uint64_t random_length() {
  switch (below(16)) {
    case 0: return 4090 + below(12);
    case 1: return below(14000);
    default: return below(300);
  }
}

void encode_some(const Encoding& encoding, Bytes& out) {
  Exact<float> gradient(encoding.n), before(encoding.n), after(encoding.n);
  Exact<std::uint32_t> scratch(scratch_words(encoding));
  fill_floats(gradient.data(), encoding.n);
  fill_floats(before.data(), encoding.n);
  EncodeCall call{};
  call.encoding = encoding;
  call.dtype = static_cast<Dtype>(below(3));
  call.source = gradient.data();  // large enough for every dtype
  call.residual_factor = 0.5f;
  call.seed = generator();
  call.out = out.data();
  call.scratch = scratch.data();
  if (below(4) == 0) {
    call.sent = before.data();
  } else if (below(2) == 0) {
    call.residual_in = before.data();
    call.residual_out = after.data();
  }
  encode(call);
  if (const char* text = check(encoding, out.data())) {
    std::fprintf(stderr, "what encode wrote is refused: %s\n", text);
    std::abort();
  }
}

/// A few bytes changed: mostly among the first, where offsets, scales and seeds are.
void mutate(Bytes& bytes) {
  if (bytes.bytes() == 0) return;
  for (std::uint64_t left = below(8); left > 0; --left) {
    const std::uint64_t range = below(2) == 0 ? bytes.bytes() : 1 + below(bytes.bytes());
    bytes.data()[below(range)] = static_cast<std::uint8_t>(below(3) == 0 ? 0xff : generator());
  }
}

void decode_all(const Encoding& encoding, Bytes& bytes) {
  const auto dtype = static_cast<Dtype>(below(3));
  Bytes out(encoding.n * (dtype == Dtype::kF32 ? 4 : 2));
  std::memset(out.data(), 0, out.bytes());
  decode({encoding, bytes.data(), out.data(), dtype, below(2) == 0});
}

/// As a hub does: several slots, in runs of whole blocks.
void gather_all_slots(const Encoding& encoding, std::vector<std::unique_ptr<Bytes>>& slots) {
  std::vector<const void*> pointers;
  std::vector<float> scales;
  for (auto& slot : slots) {
    pointers.push_back(slot->data());
    scales.push_back(0.5f);
  }
  Segment segment{};
  segment.begin = 32 * below(3);
  segment.count = encoding.n;
  segment.encoding = encoding;
  Work work{};
  work.slots = pointers.data();
  work.slot_count = static_cast<std::uint32_t>(pointers.size());
  work.scales = below(2) == 0 ? scales.data() : nullptr;
  work.factor = work.divisor = work.coef = 1.0f;
  const Average average_block = choose_average(work, segment);
  for (std::uint64_t at = 0; at < encoding.n; at += kBlock) {
    const std::size_t n = encoding.n - at < kBlock ? encoding.n - at : kBlock;
    Exact<float> scratch(n);
    average_block(work, segment, segment.begin + at, n, scratch.data());
  }
}

void one_round() {
  const Encoding encoding = encoding_of(random_codec(), random_length(), 4);
  std::vector<std::unique_ptr<Bytes>> slots;
  for (std::uint64_t left = 1 + below(3); left > 0; --left) {
    slots.push_back(std::make_unique<Bytes>(encoding.nbytes));
    Bytes& bytes = *slots.back();
    if (below(2) == 0) {
      fill(bytes.data(), bytes.bytes());
    } else {
      encode_some(encoding, bytes);
      mutate(bytes);
    }
    check(encoding, bytes.data());
  }
  decode_all(encoding, *slots[0]);
  gather_all_slots(encoding, slots);
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 1000;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 1);
  for (long round = 0; round < rounds; ++round) one_round();
  std::printf("%ld rounds\n", rounds);
  return 0;
}
