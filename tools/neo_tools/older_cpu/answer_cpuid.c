/* Answers for CPUID where a copy of a library has UD2 in its place (see older_cpu/__init__.py).

   UD2 raises SIGILL. The answer is the CPU's own without the bits of AVX-512, AVX-VNNI, BF16 and
   AMX: leaf 7 in "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, CPUID. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#define BIT(number) (1u << (number))

/* AVX512F, DQ, IFMA, PF, ER, CD, BW, VL */
static const uint32_t leaf7_ebx =
    BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
/* AVX512_VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
static const uint32_t leaf7_ecx = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
/* AVX512_4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512_FP16, AMX-TILE, AMX-INT8 */
static const uint32_t leaf7_edx = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
/* subleaf 1: AVX-VNNI, AVX512_BF16, AMX-FP16, AVX-IFMA */
static const uint32_t leaf7_1_eax = BIT(4) | BIT(5) | BIT(21) | BIT(23);
/* subleaf 1: AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 */
static const uint32_t leaf7_1_edx = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0x0b) { /* something else is illegal */
    signal(signal_number, SIG_DFL);
    return;
  }
  uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
  uint32_t eax, ebx, ecx, edx;
  __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
  if (leaf == 7 && subleaf == 0) {
    ebx &= ~leaf7_ebx;
    ecx &= ~leaf7_ecx;
    edx &= ~leaf7_edx;
  } else if (leaf == 7 && subleaf == 1) {
    eax &= ~leaf7_1_eax;
    edx &= ~leaf7_1_edx;
  }
  registers[REG_RAX] = eax;
  registers[REG_RBX] = ebx;
  registers[REG_RCX] = ecx;
  registers[REG_RDX] = edx;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGILL, &action, NULL);
}
