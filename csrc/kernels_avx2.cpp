#define ZPS_TARGET avx2
#include "kernels.inc.h"
