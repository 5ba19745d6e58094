// Every kernel, in one translation unit.
#include "attention.cu"
#include "matmul.cu"
#include "operand.cu"
#include "rows.cu"
#include "tile.cu"
