"""A stand-in for CUDA, built from `standin.cpp`, and what must hold on it."""
