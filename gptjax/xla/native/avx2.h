// Whether functions compiled for AVX2 may be called.

#ifndef GPTJAX_AVX2_H_
#define GPTJAX_AVX2_H_

#include <cstdlib>
#include <cstring>

namespace gptjax {

// False if the processor lacks it, or GPTJAX_NATIVE_ISA asks for plain C++.
inline bool UseAvx2() {
#if defined(__x86_64__)
  const char* isa = std::getenv("GPTJAX_NATIVE_ISA");
  if (isa && std::strcmp(isa, "portable") == 0) return false;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") != 0;
#else
  return false;
#endif
}

}  // namespace gptjax

#if defined(__x86_64__)
#define FOR_AVX2 __attribute__((target("avx2")))
#else
#define FOR_AVX2
#endif

#endif  // GPTJAX_AVX2_H_
