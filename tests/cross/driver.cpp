// Runs the bound functions for another process: requests on stdin, replies on stdout.
//
// tests/cross/remote.py is the other end and describes the messages. Arrays are placed between
// faulting pages, inputs cannot be written, and every second call ends its arrays at such a page,
// so that a kernel that strays dies here or is reported.

#include <nanobind/nanobind.h>
#include <stdio.h>

#include <list>

#include "fence.h"

using nanobind::Value;

namespace {

struct Request {
  std::vector<uint8_t> bytes;
  size_t at = 0;
  bool flush;  // arrays end at a faulting page
  std::list<Fence> fences;
  std::vector<const Fence*> outputs;  // that Python can write to

  const uint8_t* take(size_t n) {
    if (n > bytes.size() - at) throw std::runtime_error("a broken request");
    at += n;
    return bytes.data() + at - n;
  }
  template <class T>
  T number() {
    T x;
    memcpy(&x, take(sizeof x), sizeof x);
    return x;
  }
  std::string text() {
    const size_t n = number<uint64_t>();
    return {(const char*)take(n), n};
  }

  Value array() {
    Value v;
    v.tag = 'a';
    v.kind = number<char>();
    v.item = number<uint8_t>();
    v.writable = number<uint8_t>();
    const size_t residue = number<uint8_t>();
    size_t size = v.item;
    for (size_t axes = number<uint8_t>(); axes; --axes) {
      v.shape.push_back(number<uint64_t>());
      size *= v.shape.back();
    }
    const uint8_t* from = take(size);
    Fence& fence = fences.emplace_back(size, flush ? 64 : residue);
    v.data = fence.data();
    v.forbid_writes = [&fence] { fence.forbid_writes(); };
    memcpy(v.data, from, size);
    if (v.writable) outputs.push_back(&fence);
    return v;
  }

  Value value() {
    Value v;
    v.tag = number<char>();
    switch (v.tag) {
      case 'b':
      case 'i':
        v.integer = number<int64_t>();
        break;
      case 'f':
        v.real = number<double>();
        break;
      case 's':
        v.text = text();
        break;
      case 'l':
        for (size_t n = number<uint64_t>(); n; --n) v.items.push_back(value());
        break;
      case 'a':
        return array();
    }
    return v;
  }
};

struct Reply {
  std::vector<uint8_t> bytes;

  void put(const void* from, size_t n) {
    const uint8_t* p = (const uint8_t*)from;
    bytes.insert(bytes.end(), p, p + n);
  }
  template <class T>
  void number(T x) {
    put(&x, sizeof x);
  }
  void text(const std::string& x) {
    number<uint64_t>(x.size());
    put(x.data(), x.size());
  }
  void value(const Value& v) {
    number<char>(v.tag);
    if (v.tag == 'b' || v.tag == 'i') number<int64_t>(v.integer);
    if (v.tag == 'f') number<double>(v.real);
    if (v.tag == 's') text(v.text);
    if (v.tag == 'l') {
      number<uint64_t>(v.items.size());
      for (const Value& item : v.items) value(item);
    }
  }
  void failure(const char* type, const char* message) {
    bytes.clear();
    text(type);
    text(message);
  }
};

bool read_all(void* to, size_t n) {
  return fread(to, 1, n, stdin) == n;
}

void answer(const nanobind::module_& module, Request& request, Reply& reply) {
  const std::string name = request.text();
  const Value arguments = request.value();
  const auto found = module.functions.find(name);
  if (found == module.functions.end()) return reply.failure("AttributeError", name.c_str());
  const Value result = found->second(arguments.items);
  for (const Fence& fence : request.fences) {
    if (!fence.intact()) return reply.failure("AssertionError", "written outside of an array");
  }
  reply.text("");
  reply.value(result);
  for (const Fence* fence : request.outputs) {
    reply.number<uint8_t>(fence->writable());
    if (fence->writable()) reply.put(fence->data(), fence->size());
  }
}

}  // namespace

int main() {
  nanobind::module_ module;
  bind_module(module);
  uint64_t size;
  for (bool flush = false; read_all(&size, sizeof size); flush = !flush) {
    Request request;
    request.flush = flush;
    request.bytes.resize(size);
    if (!read_all(request.bytes.data(), size)) return 1;
    Reply reply;
    try {
      answer(module, request, reply);
    } catch (const nanobind::type_error& e) {
      reply.failure("TypeError", e.what());
    } catch (const nanobind::value_error& e) {
      reply.failure("ValueError", e.what());
    } catch (const std::invalid_argument& e) {
      reply.failure("ValueError", e.what());
    } catch (const std::bad_alloc& e) {
      reply.failure("MemoryError", e.what());
    } catch (const std::exception& e) {
      reply.failure("RuntimeError", e.what());
    }
    size = reply.bytes.size();
    fwrite(&size, sizeof size, 1, stdout);
    fwrite(reply.bytes.data(), 1, size, stdout);
    fflush(stdout);
  }
  return 0;
}
