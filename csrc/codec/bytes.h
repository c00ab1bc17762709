// Values in a piece's bytes, which may lie at any address, and codes of less than a byte.
#pragma once

#include "optim/target.h"

namespace zps::ZPS_TARGET {

template <class T>
ZPS_HD T load_as(const uint8_t* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

template <class T>
ZPS_HD void store_as(uint8_t* at, T value) {
  memcpy(at, &value, sizeof value);
}

/// A number read from memory that others may write: what is checked is what is used, because the
/// compiler cannot read it a second time.
ZPS_HD uint32_t once(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Codes lie one a byte in scratch; a byte of the piece holds 2, 4 or 8 of them, the first lowest.

struct Nibbles {
  static constexpr unsigned kCodes = 2;
  using Word = uint16_t;
  static ZPS_HD uint8_t pack(Word codes) { return static_cast<uint8_t>(codes | codes >> 4); }
  static ZPS_HD Word unpack(uint32_t byte) {
    return static_cast<Word>((byte & 0x0fu) | (byte & 0xf0u) << 4);
  }
};

struct Pairs {
  static constexpr unsigned kCodes = 4;
  using Word = uint32_t;
  static ZPS_HD uint8_t pack(Word codes) {
    return static_cast<uint8_t>(codes | codes >> 6 | codes >> 12 | codes >> 18);
  }
  static ZPS_HD Word unpack(uint32_t byte) {
    return (byte & 0x03u) | (byte & 0x0cu) << 6 | (byte & 0x30u) << 12 | (byte & 0xc0u) << 18;
  }
};

struct Bits {
  static constexpr unsigned kCodes = 8;
  using Word = uint64_t;
  static ZPS_HD uint8_t pack(Word codes) {
    codes |= codes >> 7;
    codes |= codes >> 14;
    return static_cast<uint8_t>(codes | codes >> 28);
  }
  static ZPS_HD Word unpack(uint32_t byte) {
    const uint64_t all = 0x0101010101010101u;
    const uint64_t chosen = (byte * all) & 0x8040201008040201u;  // bit i stays in byte i
    return (chosen + 0x7f * all) >> 7 & all;                     // any bit of a byte to its lowest
  }
};

}  // namespace zps::ZPS_TARGET
