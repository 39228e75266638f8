// Replays inputs without libFuzzer:
//
//     COMPRESS_FUZZ_TARGET=codes replay FILE...
//     COMPRESS_FUZZ_TARGET=codes replay --generate RUNS SEED

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void replay(const std::vector<uint8_t>& bytes) {
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

bool read_file(const char* path, std::vector<uint8_t>& bytes) {
  FILE* file = fopen(path, "rb");
  if (!file) return false;
  for (int c; (c = fgetc(file)) != EOF;) bytes.push_back((uint8_t)c);
  fclose(file);
  return true;
}

}  // namespace

int main(int count, char** words) {
  if (count == 4 && !strcmp(words[1], "--generate")) {
    std::mt19937 random((uint32_t)atoi(words[3]));
    for (int run = atoi(words[2]); run > 0; --run) {
      std::vector<uint8_t> bytes(random() % 256);
      for (uint8_t& byte : bytes) byte = (uint8_t)random();
      replay(bytes);
    }
    return 0;
  }
  for (int i = 1; i < count; ++i) {
    std::vector<uint8_t> bytes;
    if (!read_file(words[i], bytes)) {
      fprintf(stderr, "%s cannot be read\n", words[i]);
      return 2;
    }
    replay(bytes);
  }
  return 0;
}
