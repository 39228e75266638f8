// One call of a bound function, made as Python makes it, with the instruction sets compared.
//
// Arrays lie in allocations of exactly their size, at odd addresses where their items are bytes.
// Some calls are distorted: an integer or an array's length is not the one that fits. A distorted
// call may be refused or may work; either way it must not stray, and what worked must be equal
// under every instruction set. A call that fits must not be refused.

#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "input.h"

namespace fuzz {

using nanobind::Value;

// Says what is wrong and aborts.
void fail(const char* what);
inline void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

// How two results of one array are compared.
enum Compare { kBytes, kFloat32, kFloat16, kBFloat16, kFloat64, kIgnore };

bool equal(const std::vector<uint8_t>& x, const std::vector<uint8_t>& y, Compare compare);

// What no size of a small array is, and what wraps around to one that is when it is multiplied.
int64_t wild_integer(Input& input, int64_t fits);

// An array's memory.
class Block {
 public:
  Block(size_t size, size_t shift);
  uint8_t* data() const { return room_.get() + shift_; }
  bool intact() const;  // what lies before the array; the sanitizer sees what lies behind

 private:
  std::unique_ptr<uint8_t[]> room_;
  size_t shift_;
};

class Call {
 public:
  Call(const char* name, Input& input);

  void integer(size_t value);
  void flag(bool value);
  void none();
  // An array that is read. Its items are uint8, or of `kind` and `item` bytes.
  void in(const std::vector<uint8_t>& bytes, char kind = 'u', size_t item = 1);
  // An array that is written to; returns its place among the results. `before`: what it holds.
  size_t out(size_t bytes, Compare compare = kBytes, char kind = 'u', size_t item = 1);
  size_t in_out(const std::vector<uint8_t>& before, Compare compare, char kind, size_t item);

  bool distorted() const { return distorted_; }
  // An array holds what does not fit the others.
  void distort_content() { distorted_ = true; }
  // Nothing is expected of this call but that it stays inside its arrays.
  void compare_nothing() { compare_ = false; }
  // Arrays mean something where this is returned.
  void compare_where_returned(int64_t value) { needed_ = value, needs_ = true; }
  // To be ignored in one array, as where its values are sums in another order.
  void ignore(size_t place) { outputs_[place].compare = kIgnore; }

  // Calls it under every instruction set and compares. False where it was refused.
  bool run();
  // The same again under the set of the last results, with another value of one integer.
  bool again(size_t argument, int64_t value);

  bool last_is_array() const { return arguments_.back().tag == 'a'; }
  int64_t integer_result() const { return result_.integer; }
  const std::vector<uint8_t>& result(size_t place) const { return outputs_[place].first; }
  const std::vector<uint8_t>& last(size_t place) const { return outputs_[place].last; }

 private:
  struct Output {
    size_t argument, bytes, shift;
    Compare compare;
    std::vector<uint8_t> before;  // empty: a pattern, another one each time
    std::vector<uint8_t> first, last;
  };

  const char* name_;
  Input& input_;
  bool wild_, distorted_ = false, compare_ = true, needs_ = false;
  int64_t needed_ = 0;
  std::vector<Value> arguments_;
  std::vector<Block> inputs_;
  std::vector<Output> outputs_;
  Value result_;

  bool distort() { return wild_ && input_.one_in(4); }
  size_t distorted_size(size_t bytes, size_t item);
  Value array(char kind, size_t item, size_t bytes, bool writable);
  bool attempt(uint8_t pattern, Value& result);
  void take_results(std::vector<uint8_t> Output::* to, const std::vector<Block>& blocks);
  void compare(const Value& result) const;
};

const std::vector<std::string>& isas();
void set_isa(const std::string& name);

}  // namespace fuzz
