// Included first when a release wheel is compiled. glibc 2.29 introduced new versions of these functions; this selects the
// old versions, which every manylinux_2_28 system has. (The old ones also set errno, which is never read.)
#if defined(__x86_64__)
#define SENET_FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define SENET_FIRST "GLIBC_2.17"
#endif
__asm__(".symver exp,exp@" SENET_FIRST);
__asm__(".symver exp2,exp2@" SENET_FIRST);
__asm__(".symver log,log@" SENET_FIRST);
__asm__(".symver log2,log2@" SENET_FIRST);
__asm__(".symver pow,pow@" SENET_FIRST);
