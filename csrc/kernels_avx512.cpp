#define ZPS_TARGET avx512
#include "kernels.inc.h"
