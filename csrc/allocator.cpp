// Large blocks that stay with the process, in huge pages: what a training process gives torch for an allocator, and where
// the largest results of the operators lie in any process.
//
// A step allocates much what the step before did. glibc's malloc maps every block over 32 MiB anew and gives it back,
// which costs zeroing of all pages. Told to keep everything, it cuts up its holes where sizes change a little from step
// to step, as those of the planner do with the sentences of a batch, and the process grows by hundreds of megabytes
// a step. Here a released block waits in a list of blocks of its size and is taken from there. Sizes are rounded up to
// eighths of a power of two, so there are few lists. Before the process would hold more than it has had in use at once
// and a little, the pages of the blocks that have waited longest move into the new block, which saves zeroing others: a
// step needs the memory of its gradients for its activations, in blocks of other sizes.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "common.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

namespace planlm {
namespace {

constexpr size_t page = size_t(2) << 20;
constexpr size_t least = page;  // smaller blocks are malloc's

size_t rounded(size_t bytes) {
  const size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

// An aligned block of huge pages, but for what is left at its end, or null.
char* map(size_t size) {
  void* const room = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(room);
  const size_t skip = (page - reinterpret_cast<uintptr_t>(room) % page) % page;
  if (skip > 0) munmap(begin, skip);
  if (skip < page) munmap(begin + skip + size, page - skip);
  madvise(begin + skip, size, MADV_HUGEPAGE);  // advice: failing is no harm
  return begin + skip;
}

class Blocks final : public c10::Allocator {
 public:
  explicit Blocks(c10::Allocator* small) : small_(small) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < least) return of(from_malloc(bytes));
    const size_t size = rounded(bytes);
    void* block = nullptr;
    {
      const std::lock_guard guard(mutex_);
      block = take(size);
      if (block) {
        in_use_.emplace(block, size);
        used_ += size;
        most_used_ = std::max(most_used_, used_);
      }
    }
    if (!block) return of(from_malloc(bytes));
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return of(block);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }  // oneDNN's working memory comes raw

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Gives back what waits, if anything does.
  bool release() {
    const std::lock_guard guard(mutex_);
    const bool any = idle_bytes_ > 0;
    for (const auto& [size, waiting] : idle_)
      for (const Idle& idle : waiting) munmap(idle.block, size);
    for (char* const part : loose_) munmap(part, page);
    idle_.clear();
    loose_.clear();
    idle_bytes_ = 0;
    most_used_ = used_;
    return any;
  }

  // Lives as long as the process: tensors may outlive every other object.
  static Blocks& instance() {
    static Blocks* const blocks = [] {
      // A child must not find the lock taken by a thread that it does not have.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return new Blocks(c10::GetDefaultCPUAllocator());
    }();
    return *blocks;
  }

 private:
  struct Idle {
    void* block;
    uint64_t since;
  };

  static c10::DataPtr of(void* block) { return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)}; }

  // What waits is given up before torch's own error is.
  void* from_malloc(size_t bytes) {
    try {
      return small_->raw_allocate(bytes);
    } catch (const std::exception&) {
      if (!release()) throw;
    }
    return small_->raw_allocate(bytes);
  }

  void* take(size_t size) {
    auto& waiting = idle_[size];
    if (!waiting.empty()) {  // the last one released is the likeliest to be in a cache
      void* const block = waiting.back().block;
      waiting.pop_back();
      idle_bytes_ -= size;
      return block;
    }
    char* block = map(size);
    for (; !block && idle_bytes_ > 0; block = map(size)) munmap(loose_page(), page);
    if (!block) return nullptr;
    const size_t most = std::max(most_used_, used_ + size);
    char *to = block, *const end = block + size / page * page;
    while (idle_bytes_ > 0 && used_ + idle_bytes_ + size > most + most / slack) {
      // What has to go serves in the new block, as far as it has room.
      char* const from = loose_page();
      if (to == end || most > movable)
        munmap(from, page);
      else if (move(from, to))
        to += page;
      else {
        munmap(block, size);
        return nullptr;
      }
    }
    return block;
  }

  // Pages go from one place to another with what is in them: nothing is zeroed. Each may stay a mapping of its own.
  static bool move(char* from, char* to) {
    if (mremap(from, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED) return true;
    munmap(from, page);  // what was mapped at `to` may be gone
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    return mmap(to, page, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
  }

  // A page of the block that has waited longest; what is not a whole page at its end is unmapped.
  char* loose_page() {
    if (loose_.empty()) {
      auto oldest = idle_.end();
      for (auto at = idle_.begin(); at != idle_.end(); ++at)
        if (!at->second.empty() && (oldest == idle_.end() || at->second.front().since < oldest->second.front().since))
          oldest = at;
      const size_t size = oldest->first, whole = size / page * page;
      char* const block = static_cast<char*>(oldest->second.front().block);
      oldest->second.pop_front();
      for (size_t at = 0; at < whole; at += page) loose_.push_back(block + at);
      if (whole < size) munmap(block + whole, size - whole);
      idle_bytes_ -= size - whole;
    }
    char* const found = loose_.back();  // a block is a page at least
    loose_.pop_back();
    idle_bytes_ -= page;
    return found;
  }

  static void give_back(void* block) {
    if (reinterpret_cast<uintptr_t>(block) % page != 0 || !instance().keep(block))
      instance().small_->raw_deallocate(block);
  }

  bool keep(void* block) {
    const std::lock_guard guard(mutex_);
    const auto found = in_use_.find(block);
    if (found == in_use_.end()) return false;
    c10::profiledCPUMemoryReporter().Delete(block);
    const size_t size = found->second;
    in_use_.erase(found);
    used_ -= size;
    idle_[size].push_back({block, ++clock_});
    idle_bytes_ += size;
    return true;
  }

  static constexpr size_t slack = 16;                   // a sixteenth
  static constexpr size_t movable = size_t(32) << 30;  // 16,384 pages: Linux allows 65,530 mappings

  c10::Allocator* const small_;
  std::mutex mutex_;
  std::unordered_map<void*, size_t> in_use_;
  std::unordered_map<size_t, std::deque<Idle>> idle_;
  std::vector<char*> loose_;
  size_t used_ = 0, most_used_ = 0, idle_bytes_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace

c10::Allocator* blocks() { return &Blocks::instance(); }

void keep_blocks() { c10::SetCPUAllocator(blocks()); }

void release_blocks() { Blocks::instance().release(); }

}  // namespace planlm

#else
namespace planlm {
c10::Allocator* blocks() { return nullptr; }
void keep_blocks() {}
void release_blocks() {}
}  // namespace planlm
#endif

TORCH_LIBRARY_FRAGMENT(planlm, library) {
  library.def("keep_blocks() -> ()", &planlm::keep_blocks);
  library.def("release_blocks() -> ()", &planlm::release_blocks);
}
