// Included before all else when a wheel for others is compiled: functions that glibc 2.29 gave a new version are asked for
// in the one that every manylinux_2_28 system has. (They set errno as well, which nobody reads.)
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
