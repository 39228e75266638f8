#include "call.h"

#include <stdio.h>
#include <stdlib.h>

namespace fuzz {
namespace {

const nanobind::module_& kernels() {
  static const nanobind::module_ module = [] {
    nanobind::module_ made;
    bind_module(made);
    return made;
  }();
  return module;
}

bool is_nan(const uint8_t* at, Compare compare) {
  if (compare == kFloat64) {
    double x;
    memcpy(&x, at, 8);
    return x != x;
  }
  uint32_t bits = 0;
  memcpy(&bits, at, compare == kFloat32 ? 4 : 2);
  if (compare == kFloat32) return (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return (bits & 0x7FFFu) > (compare == kFloat16 ? 0x7C00u : 0x7F80u);
}

}  // namespace

int64_t wild_integer(Input& input, int64_t fits) {
  switch (input.below(16)) {
    case 0:
      return fits + 1;
    case 1:
      return fits - 1;
    case 2:
      return 0;
    case 3:
      return -1;
    case 4:
      return input.byte();
    case 5:
      return fits * 2;
    case 6:
      return (int64_t)((uint64_t)fits + ((uint64_t)1 << (56 + input.below(7))));
    case 7:
      return (int64_t)((uint64_t)fits + ((uint64_t)1 << 63));
    case 8:
      return INT64_MAX;
    case 9:
      return INT64_MIN;
    case 10:
      return ((int64_t)1 << 32) + fits;
    case 11:
      return ((int64_t)1 << 31) - 1 + (int64_t)input.below(3);
    case 12:
      return (int64_t)1 << input.below(63);
    case 13:
      return ((int64_t)1 << input.below(63)) - 1;
    default:
      return (int64_t)input.word();
  }
}

// Equal bits, but for what a NaN says beyond being one.
bool equal(const std::vector<uint8_t>& x, const std::vector<uint8_t>& y, Compare compare) {
  if (x == y) return true;
  if (compare == kBytes || x.size() != y.size()) return false;
  const size_t item = compare == kFloat64 ? 8 : compare == kFloat32 ? 4 : 2;
  for (size_t i = 0; i + item <= x.size(); i += item) {
    if (memcmp(&x[i], &y[i], item) && !(is_nan(&x[i], compare) && is_nan(&y[i], compare))) {
      return false;
    }
  }
  return true;
}

void fail(const char* what) {
  fprintf(stderr, "fuzz_kernels: %s\n", what);
  abort();
}

const std::vector<std::string>& isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const Value& v : kernels().functions.at("available_isas")({}).items) {
      found.push_back(v.text);
    }
    return found;
  }();
  return names;
}

void set_isa(const std::string& name) {
  kernels().functions.at("set_isa")({nanobind::to_value(name)});
}

constexpr uint8_t kGuard = 0xA5;

Block::Block(size_t size, size_t shift) : room_(new uint8_t[size + shift]), shift_(shift) {
  memset(room_.get(), kGuard, shift);
}

bool Block::intact() const {
  for (size_t i = 0; i < shift_; ++i) {
    if (room_[i] != kGuard) return false;
  }
  return true;
}

Call::Call(const char* name, Input& input)
    : name_(name), input_(input), wild_(input.byte() % 4 == 3) {}

void Call::integer(size_t value) {
  int64_t given = (int64_t)value;
  if (distort()) given = wild_integer(input_, given);
  distorted_ |= given != (int64_t)value;
  arguments_.push_back(nanobind::to_value(given));
}

void Call::flag(bool value) {
  arguments_.push_back(nanobind::to_value(value));
}

void Call::none() {
  arguments_.emplace_back();
}

size_t Call::distorted_size(size_t bytes, size_t item) {
  if (!distort()) return bytes;
  distorted_ = true;
  static const int steps[] = {-1, 1, -2, 2, -8, 8, -64, 64};
  const size_t which = input_.below(10);
  if (which == 8) return 0;
  if (which == 9) return bytes * 2;
  const int64_t changed = (int64_t)bytes + steps[which] * (int64_t)item;
  return changed < 0 ? 0 : (size_t)changed;
}

Value Call::array(char kind, size_t item, size_t bytes, bool writable) {
  Value v;
  v.tag = 'a';
  v.kind = kind;
  v.item = item;
  v.writable = writable;
  v.shape = {bytes / item};
  v.forbid_writes = [] {};
  return v;
}

void Call::in(const std::vector<uint8_t>& bytes, char kind, size_t item) {
  const size_t size = distorted_size(bytes.size(), item);
  const size_t known = size < bytes.size() ? size : bytes.size();
  const Block& block = inputs_.emplace_back(size, input_.below(16) / item * item);
  if (known) memcpy(block.data(), bytes.data(), known);
  if (size > known) memset(block.data() + known, 0, size - known);
  arguments_.push_back(array(kind, item, size, false));
  arguments_.back().data = block.data();
}

size_t Call::out(size_t bytes, Compare compare, char kind, size_t item) {
  const size_t size = distorted_size(bytes, item);
  outputs_.push_back(
      {arguments_.size(), size, input_.below(16) / item * item, compare, {}, {}, {}});
  arguments_.push_back(array(kind, item, size, true));
  return outputs_.size() - 1;
}

size_t Call::in_out(const std::vector<uint8_t>& before, Compare compare, char kind, size_t item) {
  const size_t place = out(before.size(), compare, kind, item);
  outputs_[place].before = before;
  outputs_[place].before.resize(outputs_[place].bytes);
  return place;
}

bool Call::attempt(uint8_t pattern, Value& result) {
  std::vector<Block> blocks;
  for (Output& o : outputs_) {
    const Block& block = blocks.emplace_back(o.bytes, o.shift);
    if (o.before.empty()) {
      memset(block.data(), pattern, o.bytes);
    } else {
      memcpy(block.data(), o.before.data(), o.bytes);
    }
    arguments_[o.argument].data = block.data();
  }
  bool done = true;
  try {
    result = kernels().functions.at(name_)(arguments_);
  } catch (const nanobind::type_error&) {
    done = false;
  } catch (const std::invalid_argument&) {
    done = false;
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    expect(blocks[i].intact(), "written before an array");
    outputs_[i].last.assign(blocks[i].data(), blocks[i].data() + outputs_[i].bytes);
  }
  for (const Block& block : inputs_) expect(block.intact(), "written before an input");
  return done;
}

void Call::compare(const Value& result) const {
  expect(result.integer == result_.integer, "instruction sets return different numbers");
  if (needs_ && result.integer != needed_) return;
  for (const Output& o : outputs_) {
    if (o.compare == kIgnore) continue;
    // What nobody wrote differs, too: the memory was filled with another pattern.
    if (!equal(o.first, o.last, o.compare)) {
      size_t at = 0;
      while (o.first[at] == o.last[at]) ++at;
      fprintf(stderr, "fuzz_kernels: %s: argument %zu of %zu bytes, byte %zu: %02x and %02x\n",
              name_, o.argument, o.bytes, at, o.first[at], o.last[at]);
      for (const Value& v : arguments_) {
        fprintf(stderr, v.tag == 'a' ? " [%lld]" : " %lld",
                (long long)(v.tag == 'a' ? (int64_t)v.shape[0] : v.integer));
      }
      fail("instruction sets write different bytes, or leave some unwritten");
    }
  }
}

bool Call::run() {
  bool first = true;
  for (const std::string& isa : isas()) {
    set_isa(isa);
    Value result;
    const bool done = attempt(first ? 0xA5 : 0x5A, result);
    if (!done) {
      expect(distorted_, "a call that fits was refused");
      expect(first, "refused under one instruction set, not under another");
      return false;
    }
    if (first) {
      result_ = result;
      for (Output& o : outputs_) o.first = o.last;
    } else if (compare_) {
      compare(result);
    }
    first = false;
  }
  return true;
}

bool Call::again(size_t argument, int64_t value) {
  const std::vector<Output> before = outputs_;
  arguments_[argument].integer = value;
  Value result;
  if (!attempt(0x3C, result)) return false;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    expect(equal(before[i].last, outputs_[i].last,
                 outputs_[i].compare == kIgnore ? kBytes : outputs_[i].compare),
           "another number of threads gives other bytes");
  }
  return true;
}

}  // namespace fuzz
