// A check that says where, with which values, and ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>

#define EXPECT(condition, ...)                                                   \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                   \
            std::fprintf(stderr, "\n");                                          \
            std::exit(1);                                                        \
        }                                                                        \
    } while (false)
