// What functions are compiled for besides plain C++, and whether they may be called.

#ifndef GPTJAX_ISA_H_
#define GPTJAX_ISA_H_

#include <cstdlib>
#include <cstring>

namespace gptjax {

// Whether GPTJAX_NATIVE_ISA is unset, or one of those that begin so.
inline bool Asked(const char* beginning) {
  const char* isa = std::getenv("GPTJAX_NATIVE_ISA");
  return !isa || !*isa || std::strncmp(isa, beginning, std::strlen(beginning)) == 0;
}

// False if the processor lacks AVX2, or GPTJAX_NATIVE_ISA asks for plain C++. What has AVX2 has F16C,
// which not every compiler can ask for.
inline bool UseAvx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return Asked("avx") && __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

// False if the processor lacks AVX-512, or GPTJAX_NATIVE_ISA asks for less. For vectors of 256 bits
// it has twice as many registers as AVX2.
inline bool UseAvx512() {
#if defined(__x86_64__)
  return UseAvx2() && Asked("avx512") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace gptjax

#if defined(__x86_64__)
#define FOR_AVX2 __attribute__((target("avx2,f16c")))
#define FOR_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512vl")))
#else
#define FOR_AVX2
#define FOR_AVX512
#endif

#endif  // GPTJAX_ISA_H_
