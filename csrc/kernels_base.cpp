#define ZPS_TARGET base
#include "kernels.inc.h"
