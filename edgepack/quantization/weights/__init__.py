"""Weight quantization: scales, rounding to nearest or by GPTQ, bias correction, and what prepares weights."""
