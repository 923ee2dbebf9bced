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

// How the processor's caches want to be asked for lines that a loop on several rows will need, beside what the hardware
// reads ahead by itself: those of the next rows, and no nearer than to the second cache, or else those a few hundred
// bytes ahead, to the first. No result hangs on it.
bool fetches_far();

// Throws std::invalid_argument for a level that is not compiled or that this processor lacks; "" is the best one.
void set_level(const std::string& name);

}  // namespace hfac
