// Random loops by a team of as many members as told: each part is done once, after all parts of the loop before, by a member that got
// ready once; what it is told of its next part lies ahead. Now and then members sleep, within parts and between loops.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "team.h"

int main(int, char** arguments) {
    const int most = atoi(arguments[1]), calls = atoi(arguments[2]);
    pdserve::Team team(most);
    std::mt19937 random(static_cast<unsigned>(most));
    std::atomic<long> wrong{0};
    for (int call = 0; call < calls; ++call) {
        team.use(1 + random() % unsigned(most));
        const size_t num_loops = 1 + random() % 40;
        std::vector<int64_t> counts(num_loops);
        for (int64_t& count : counts) count = random() % 3 ? random() % 60 : random() % 3;
        std::vector<std::vector<std::atomic<int>>> times;
        for (const int64_t count : counts) times.emplace_back(size_t(count));
        std::vector<std::atomic<int64_t>> done(num_loops);
        const bool is_slow = call % 20 == 0;
        const unsigned seed = random();
        team.run([&](int member) {
            std::mt19937 own(seed + unsigned(member));
            const auto maybe_sleep = [&](unsigned one_in) {
                if (is_slow && own() % one_in == 0) usleep(own() % 300);
            };
            for (size_t loop = 0; loop < num_loops; ++loop) {
                maybe_sleep(40);
                int ready = 0;
                team.share(member, counts[loop], [&] { ++ready; }, [&](int64_t part, int64_t next) {
                    wrong += ready != 1 || next <= part || next > counts[loop];
                    wrong += loop > 0 && done[loop - 1] != counts[loop - 1];
                    times[loop][size_t(part)] += 1;
                    maybe_sleep(200);
                    done[loop] += 1;
                });
                team.barrier(member);
                wrong += done[loop] != counts[loop];
            }
        });
        for (const auto& loop : times)
            for (const auto& count : loop) wrong += count != 1;
    }
    printf("%ld\n", wrong.load());
}
