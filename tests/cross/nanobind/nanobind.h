// The part of nanobind that the bindings use, without Python: arguments come from driver.cpp.
//
// With this directory in front of the real nanobind, csrc/cpu/binding.cpp becomes a table of
// functions in a program of its own, which runs where no Python does: under an emulator.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace nanobind {

// What Python passes and gets back. `tag`: n(one), b(ool), i(nteger), f(loat), s(tring), l(ist),
// a(rray).
struct Value {
  char tag = 'n';
  int64_t integer = 0;
  double real = 0;
  std::string text;
  std::vector<Value> items;

  // Arrays, C-contiguous. kind: b, i, u or f, as in numpy.
  char kind = 0;
  size_t item = 0;
  bool writable = false;
  std::vector<size_t> shape;
  uint8_t* data = nullptr;
  std::function<void()> forbid_writes;  // called where a function takes it as const
};

struct type_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct value_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const char* wanted) {
  if (!holds) throw type_error(std::string("incompatible argument: wanted ") + wanted);
}

template <long>
struct ndim {};
struct c_contig {};
struct numpy {};
namespace device {
struct cpu {};
}  // namespace device

template <class>
struct Rank {
  static constexpr long value = -1;
};
template <long N>
struct Rank<ndim<N>> {
  static constexpr long value = N;
};

template <class T, class... Options>
class ndarray {
 public:
  using Item = std::remove_const_t<T>;

  explicit ndarray(const Value& v) : value_(&v) {
    constexpr char kind = std::is_same_v<Item, bool>       ? 'b'
                          : std::is_floating_point_v<Item> ? 'f'
                          : std::is_signed_v<Item>         ? 'i'
                                                           : 'u';
    expect(v.tag == 'a' && v.kind == kind && v.item == sizeof(T), "an array of another dtype");
    expect(std::is_const_v<T> || v.writable, "a writable array");
    if (std::is_const_v<T>) v.forbid_writes();
    for (const long rank : {Rank<Options>::value...}) {
      expect(rank < 0 || (size_t)rank == v.shape.size(), "an array of another rank");
    }
  }

  T* data() const { return (T*)value_->data; }
  size_t ndim() const { return value_->shape.size(); }
  size_t shape(size_t axis) const { return value_->shape[axis]; }
  size_t size() const {
    size_t n = 1;
    for (const size_t s : value_->shape) n *= s;
    return n;
  }

 private:
  const Value* value_;
};

template <class T>
struct Cast;

template <class T>
T from_value(const Value& v) {
  if constexpr (std::is_same_v<T, bool>) {
    expect(v.tag == 'b', "a bool");
    return v.integer != 0;
  } else if constexpr (std::is_integral_v<T>) {
    expect(v.tag == 'i' || v.tag == 'b', "an integer");
    const T result = (T)v.integer;
    expect((int64_t)result == v.integer && (v.integer < 0) == (result < T(0)), "a smaller integer");
    return result;
  } else if constexpr (std::is_floating_point_v<T>) {
    expect(v.tag == 'f' || v.tag == 'i', "a number");
    return v.tag == 'f' ? (T)v.real : (T)v.integer;
  } else if constexpr (std::is_same_v<T, std::string>) {
    expect(v.tag == 's', "a string");
    return v.text;
  } else {
    return Cast<T>::from(v);
  }
}

template <class T, class... Options>
struct Cast<ndarray<T, Options...>> {
  static ndarray<T, Options...> from(const Value& v) { return ndarray<T, Options...>(v); }
};
template <class T>
struct Cast<std::optional<T>> {
  static std::optional<T> from(const Value& v) {
    if (v.tag == 'n') return std::nullopt;
    return from_value<T>(v);
  }
};
template <class T>
struct Cast<std::vector<T>> {
  static std::vector<T> from(const Value& v) {
    expect(v.tag == 'l', "a list");
    std::vector<T> result;
    for (const Value& item : v.items) result.push_back(from_value<T>(item));
    return result;
  }
};

inline Value to_value(bool x) {
  Value v;
  v.tag = 'b';
  v.integer = x;
  return v;
}
inline Value to_value(const std::string& x) {
  Value v;
  v.tag = 's';
  v.text = x;
  return v;
}
inline Value to_value(const char* x) {
  return to_value(std::string(x));
}
template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
Value to_value(T x) {
  Value v;
  v.tag = std::is_integral_v<T> ? 'i' : 'f';
  v.integer = (int64_t)x;
  v.real = (double)x;
  return v;
}
template <class T>
Value to_value(const std::vector<T>& x) {
  Value v;
  v.tag = 'l';
  for (const T& item : x) v.items.push_back(to_value(item));
  return v;
}

struct arg {
  explicit arg(const char* = nullptr) {}
  arg& none(bool = true) { return *this; }
  arg& noconvert(bool = true) { return *this; }
};

struct gil_scoped_release {
  gil_scoped_release() {}
};

class module_ {
 public:
  using Function = std::function<Value(const std::vector<Value>&)>;
  std::map<std::string, Function> functions;

  std::string& doc() { return doc_; }

  template <class F, class... Extra>
  void def(const char* name, F&& f, const Extra&...) {
    add(name, std::function(std::forward<F>(f)));
  }

 private:
  std::string doc_;

  template <class R, class... Args>
  void add(const char* name, std::function<R(Args...)> f) {
    functions[name] = [f](const std::vector<Value>& args) {
      expect(args.size() == sizeof...(Args), "another number of arguments");
      return call(f, args, std::index_sequence_for<Args...>());
    };
  }

  template <class R, class... Args, size_t... I>
  static Value call(const std::function<R(Args...)>& f, const std::vector<Value>& args,
                    std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
      f(from_value<std::decay_t<Args>>(args[I])...);
      return {};
    } else {
      return to_value(f(from_value<std::decay_t<Args>>(args[I])...));
    }
  }
};

}  // namespace nanobind

void bind_module(nanobind::module_& module);

#define NB_MODULE(name, variable) void bind_module(nanobind::module_& variable)
