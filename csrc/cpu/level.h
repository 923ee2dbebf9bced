// Which instruction set the kernels use: the best one that the processor has, or a lower one by request.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hfac {

const Kernels& kernels();

// Names of the levels that are compiled, or of those among them that this processor can use.
std::vector<std::string> levels(bool usable);
std::string level();

// Which lines that a loop on several rows will need this processor's caches want to be asked for, beside what the
// hardware reads ahead by itself: those so many bytes further along each row, into the first cache, or kNextRows. No
// result hangs on it.
int64_t fetch_ahead();

// Throws std::invalid_argument for a level that is not compiled or that this processor lacks; "" is the best one.
void set_level(const std::string& name);

}  // namespace hfac
