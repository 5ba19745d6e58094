// Every kernel, in one translation unit.
#include "attention.cu"
#include "matmul.cu"
#include "operand.cu"
#include "mixture.cu"
#include "recurrent.cu"
#include "rows.cu"
#include "sample.cu"
#include "tile.cu"
